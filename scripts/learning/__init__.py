"""What trainings of demo.py, train.py and finetune.py share."""

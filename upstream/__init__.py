"""Everything of Transformers that is not its documented interface.

Other rooms import from Transformers only what its documentation promises, and what stands here.
Each part says what it is for and since which release it works as it is used here; all are good for
every release from `TESTED[0]` to `TESTED[1]`. `tests/upstream` asks each of them for what is relied
on, so that a release that changes one is told by its name.

| file | what it takes |
|---|---|
| `releases.py` | the releases that all tests have run on |
| `interfaces.py` | names that are used as they are |
| `arguments.py` | what Transformers and its trainers hand to a forward |
| `remote_code.py` | what is done with the code beside weights |
| `models.py` | how a model is loaded, divided among processes and saved |
| `caches.py` | Transformers' own caches, and what its loop calls one |
| `generation.py` | `generate()`: its cache, and whether each step reads the right tokens |
| `late_stop.py` | whether to stop is asked one token late |
| `trainer.py` | how Trainer writes checkpoints |

Undocumented methods that a model or a Trainer has to override are overridden by the classes
`PreTrainedModelHooks`, `GenerationHooks` and `CheckpointHooks`, which call methods with names of
our own.
"""

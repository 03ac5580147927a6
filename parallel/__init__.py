"""Several processes: plans, tensor parallelism, context parallelism, FSDP."""

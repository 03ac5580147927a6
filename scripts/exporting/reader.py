"""What stands in a GGUF, as one line of JSON, by the checkout's own `gguf`.

python -P reader.py LLAMA_CPP FILE
"""

import json
import sys
from typing import Any


def describe(file: str) -> dict[str, Any]:
    """Keys and tensors of a file.

    Args:
        file: A GGUF.

    Returns:
        "keys": value by key; "tensors": shape by name, the first dimension contiguous; "types":
        tensors by type.
    """
    import gguf

    reader = gguf.GGUFReader(file)
    types: dict[str, int] = {}
    for tensor in reader.tensors:
        types[tensor.tensor_type.name] = types.get(tensor.tensor_type.name, 0) + 1
    return {
        "keys": {key: field.contents() for key, field in reader.fields.items()},
        "tensors": {t.name: [int(size) for size in t.shape] for t in reader.tensors},
        "types": types,
    }


if __name__ == "__main__":
    sys.path.insert(0, f"{sys.argv[1]}/gguf-py")
    print(json.dumps(describe(sys.argv[2])))

"""The releases of Transformers that this package is tested with."""

import transformers

# The oldest and the newest release that all tests have run on.
TESTED = ("5.17.0", "5.24.0")


def versions() -> str:
    """The installed and the tested versions, for messages."""
    return (
        f"Transformers {transformers.__version__} is installed, this package is tested with "
        f"{TESTED[0]} to {TESTED[1]}"
    )

"""What Transformers does with the code beside weights (`trust_remote_code=True`).

It saves the file of a class that is registered for an Auto class, and what this file imports from
beside itself, by their basenames: right for a flat folder, wrong for a package of folders. A
model's `save_pretrained` does that first and calls its configuration's afterwards.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from transformers.utils import PushToHubMixin

# How Transformers finds a file's siblings: in its text, strings and comments included.
SIBLING_IMPORT = re.compile(r"^\s*(?:import\s+\.(\S+)\s*$|from\s+\.(\S+)\s+import)", re.MULTILINE)


class SavesCode(PushToHubMixin):
    """Base of a configuration, before Transformers' own; the installed package sets both fields.

    In a flat copy beside weights they are None, and Transformers copies the files on.
    """

    write_code: ClassVar[Callable[[Path], None] | None] = None
    code_classes: ClassVar[dict[str, str] | None] = None  # `auto_map`

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Save `config.json`, and beside it the code of configuration and models.

        Args:
            save_directory: Folder to save in; made if need be.
            push_to_hub: Whether to push these files too.
            **kwargs: Arguments of `push_to_hub()`, and `repo_id` (default: the folder's name).
        """
        write_code = type(self).write_code
        if write_code is None:
            super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
            return
        own = getattr(self, "auto_map", None) or {}  # a subclass may be registered by itself
        kept = {auto_class: name for auto_class, name in own.items() if "--" not in str(name)}
        self.auto_map = {**(self.code_classes or {}), **kept}
        super().save_pretrained(save_directory)
        write_code(Path(save_directory))  # over the entry file that Transformers has copied
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)

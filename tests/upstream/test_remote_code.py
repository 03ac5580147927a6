"""`upstream/remote_code.py`: how Transformers finds and saves the code beside weights."""

import pytest
import transformers
from builders import tiny_model
from touchpoints import CHANGED
from transformers.dynamic_module_utils import get_relative_imports

from kimi_linear.upstream.remote_code import SIBLING_IMPORT, SavesCode

pytestmark = pytest.mark.core


def test_siblings_are_found_by_their_text(tmp_path):
    """In strings too, but only what begins a line and names a module."""
    text = "from .a import x\nif 1:\n    from .b import (\n        y)\n'''\nfrom .c import d\n"
    text += "import .e\n'''\nx = 1; from .f import g\nfrom . import h\n# from .i import j\n"
    (tmp_path / "module.py").write_text(text)
    found = {"".join(groups) for groups in SIBLING_IMPORT.findall(text)}
    assert found == {"a", "b", "c", "e"}
    assert found == set(get_relative_imports(tmp_path / "module.py")), CHANGED


def test_a_model_saves_its_configuration_after_its_code(monkeypatch, tmp_path):
    """The flat copy, which the configuration writes, is put over the file that was copied."""
    order = []

    def copied(obj, folder, config=None):
        order.append(type(obj).__name__)

    for module in (transformers.modeling_utils, transformers.configuration_utils):
        monkeypatch.setattr(module, "custom_object_save", copied)
    monkeypatch.setattr(SavesCode, "write_code", lambda folder: order.append("flat copy"))
    tiny_model().save_pretrained(tmp_path)
    assert order == ["KimiLinearForCausalLM", "KimiLinearConfig", "flat copy"], CHANGED

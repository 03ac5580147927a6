"""The drawing of the rooms shows the present imports."""

from pathlib import Path

import draw_rooms
import pytest

DRAWING = Path(__file__).parents[2] / "docs" / "rooms.svg"


def test_the_committed_drawing_is_that_of_the_present_code():
    assert DRAWING.read_text() == draw_rooms.draw(), "run `make drawing`"


def test_every_room_of_the_contract_is_there_and_described():
    rooms = [room for floor in draw_rooms.floors() for room in floor]
    assert set(draw_rooms.NOTES) == set(rooms)
    for room in rooms:
        assert (draw_rooms.ROOT / room).is_dir() or (draw_rooms.ROOT / f"{room}.py").is_file()
    pairs = draw_rooms.room_imports(rooms)
    assert ("modeling_kimi_linear", "layers") in pairs
    assert not [importer for importer, imported in pairs if imported == "modeling_kimi_linear"]


@pytest.mark.parametrize(
    ("pair", "is_red"),
    [
        (("modeling_kimi_linear", "ops"), False),
        (("parallel", "training"), False),
        (("ops", "layers"), True),
    ],
)
def test_an_import_that_goes_up_is_red(pair, is_red, monkeypatch):
    monkeypatch.setattr(draw_rooms, "room_imports", lambda rooms: [pair])
    drawing = draw_rooms.draw()
    assert (draw_rooms.RED in drawing) == is_red
    assert ("still goes up" in drawing) == is_red


def test_a_path_that_is_gone_is_an_error(monkeypatch):
    cells = [("ops/gone", "")] * 3
    monkeypatch.setattr(draw_rooms, "WAY", [(("KDA", ""), *cells)])
    with pytest.raises(FileNotFoundError, match="ops/gone"):
        draw_rooms.draw()

"""More captions from a file's own."""
import pytest

from data import read_captions
from extras import recombine
from extras.cli import InputError

FOUR = ["a dog barks while rain falls", "a cat meows while a bell rings",
        "wind blows, then a man speaks", "a siren wails"]
NEW = {"a dog barks while a bell rings", "a cat meows while rain falls"}


def test_ends_are_exchanged_after_the_same_word_only():
    assert set(recombine.recombine(FOUR, 2)) == NEW
    assert recombine.recombine(FOUR, 1, exclude=["a cat meows while rain falls"]) == [
        "a dog barks while a bell rings"]
    with pytest.raises(InputError, match="--number 3: 2 new captions were found, from 3 that"):
        recombine.recombine(FOUR, 3)
    with pytest.raises(InputError, match="0 new captions were found, from 0 that have"):
        recombine.recombine(["a siren wails"], 1)


def test_a_caption_is_cut_at_its_first_joining_word_after_a_comma_too():
    three = ["Wind, and then a dog barks while it rains", "Birds sing and then a man speaks"]
    assert set(recombine.recombine(three, 2)) == {
        "Wind, and then a man speaks", "Birds sing and then a dog barks while it rains"}


def test_such_as_and_as_well_as_are_no_joins():
    two = ["Birds chirp as a car passes", "Tools such as saws buzz as a man talks"]
    assert set(recombine.recombine(two, 2)) == {
        "Birds chirp as a man talks", "Tools such as saws buzz as a car passes"}
    with pytest.raises(InputError, match="from 0 that have"):
        recombine.recombine(["A cat as well as a dog", "A bird as well as a bee"], 1)


def test_the_seed_decides_what_is_drawn():
    many = [f"sound {i} then sound {i + 1}" for i in range(50)]
    one, again, other = (recombine.recombine(many, 40, seed) for seed in (0, 0, 1))
    assert one == again != other and len({*one, *many}) == 90


def test_the_file_holds_both_and_trains(tmp_path):
    (tmp_path / "some.txt").write_text("\n".join(FOUR))
    (tmp_path / "test.txt").write_text("a dog barks while a bell rings\n")
    command = [str(tmp_path / "some.txt"), "--number", "1", "--exclude", str(tmp_path / "test.txt"),
               "--out", str(tmp_path / "more.csv")]
    recombine.main(command)
    assert read_captions(tmp_path / "more.csv")[0] == [*FOUR, "a cat meows while rain falls"]
    before = (tmp_path / "more.csv").read_bytes()
    with pytest.raises(InputError, match="more.csv: exists"):
        recombine.main(command)
    with pytest.raises(InputError, match="--number 9: 1 new"):
        recombine.main([*command[:-1], str(tmp_path / "new/none.csv"), "--number", "9"])
    with pytest.raises(InputError, match="more.txt: must end in .csv"):
        recombine.main([*command[:-1], str(tmp_path / "more.txt")])
    assert (tmp_path / "more.csv").read_bytes() == before and not (tmp_path / "new").exists()
    recombine.main([*command[:-1], str(tmp_path / "new/more.csv")])
    assert (tmp_path / "new/more.csv").read_bytes() == before

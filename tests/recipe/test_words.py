from finetune.recipe.words import shorten


def test_shorten_keeps_one_printable_line_of_the_width():
    assert shorten("a\nb\0") == "a?b?"
    assert len(shorten("x" * 1000, 60)) == 60
    assert shorten("x" * 60, 60) == "x" * 60

"Progressive sizes: what a specification says, and what is refused."

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.data.sizes import parse_sizes
from learner.errors import UsageError


@given(st.floats(0, 1))
def test_stages_share_the_run(progress: float) -> None:
    assert parse_sizes("128").at(progress) == parse_sizes(128).at(progress) == 128
    assert parse_sizes("128:160").at(progress) == (128 if progress < 0.5 else 160)
    sizes = parse_sizes("96@0.2:128@.4:144:160")
    expected = next(side for end, side in ((0.2, 96), (0.6, 128), (0.8, 144), (2, 160)) if progress < end - 1e-9)
    if all(abs(progress - end) > 1e-6 for end in (0.2, 0.6, 0.8)):
        assert sizes.at(progress) == expected


def test_each_step_of_a_run_has_its_size() -> None:
    sizes = parse_sizes("128@0.3:160")
    assert [sizes.at(step / 10) for step in range(10)] == [128] * 3 + [160] * 7
    assert sizes.at(1.0) == 160
    assert parse_sizes("96@0.5:128@0.5").at(0.999) == 128


def test_the_last_is_validations_and_the_largest_what_is_stored() -> None:
    sizes = parse_sizes("160:192:128")
    assert (sizes.last, sizes.largest) == (128, 192)


@pytest.mark.parametrize("spec", ["", "0", "-3", "128:", "128:x", "128-160", "128@2:160", "12.5", "128@:160", "1 2",
                                  "4097", "64:99999", "9" * 5000])  # fmt: skip
def test_what_is_no_size_is_refused(spec: str) -> None:
    with pytest.raises(UsageError, match=r"it must be pixels, or stages of them such as 128@0.3:144:160"):
        parse_sizes(spec)


@pytest.mark.parametrize("spec", ["128@0.5:160@0.4", "128@0.7:160@0.6", "128@0.5:144@0.5:160", "128@0.0:160"])
def test_fractions_that_do_not_make_a_run_are_refused(spec: str) -> None:
    with pytest.raises(UsageError, match=r"must be above 0 and make 1; leave one out for the rest"):
        parse_sizes(spec)

"Tensors side by side: every number is kept, in the strides it had, and what lies right already is not moved."

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.flat import ALIGN, together, views

shapes = st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=1, max_size=6)


def numbers(shapes, channels_last: bool = False) -> list[torch.Tensor]:
    "A tensor of each shape, each number another one."
    tensors, first = [], 1
    for shape in shapes:
        count = torch.Size(shape).numel()
        tensor = torch.arange(first, first + count, dtype=torch.float32).view(shape)
        first += count
        last = channels_last and tensor.dim() == 4
        tensors.append(tensor.contiguous(memory_format=torch.channels_last) if last else tensor)
    return tensors


@given(shapes, st.booleans())
def test_all_is_kept_and_the_gaps_are_zeros(shapes, channels_last) -> None:
    tensors = numbers(shapes, channels_last)
    flat, copies = together(tensors, tensors)
    assert all(torch.equal(copy, tensor) for copy, tensor in zip(copies, tensors, strict=True))
    assert [copy.stride() for copy in copies] == [tensor.stride() for tensor in tensors]
    assert flat.count_nonzero() == sum(tensor.numel() for tensor in tensors)
    assert all((copy.data_ptr() - flat.data_ptr()) % (4 * ALIGN) == 0 for copy in copies if copy.numel())


@given(shapes)
def test_what_lies_side_by_side_stays_where_it_is(shapes) -> None:
    tensors = numbers(shapes)
    flat, copies = together(tensors, tensors)
    again, same = together(copies, tensors)
    assert again.data_ptr() == flat.data_ptr() and again.shape == flat.shape
    assert all(one is other for one, other in zip(same, copies, strict=True))
    part, _ = together(copies[1:] or copies, tensors[1:] or tensors)
    assert part.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr(), "neighbours out of a larger buffer"


def test_a_flat_tensor_reaches_no_further_than_its_last_piece() -> None:
    both = torch.arange(10.0)
    flat, _ = together([both[:3]], [both[:3]])
    flat.zero_()
    assert both.tolist() == [0, 0, 0, 3, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("given", [torch.ones(2, 3, 4, 4), torch.ones(4, 4, 3, 2).permute(3, 2, 0, 1)])
def test_pieces_follow_the_strides_of_their_models(given) -> None:
    like = torch.empty(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    flat, (copy,) = together([given], [like])
    assert copy.stride() == like.stride() and torch.equal(copy, given)
    assert views(flat, [like])[0].data_ptr() == copy.data_ptr()


def test_a_tensor_with_overlaps_is_spread_out() -> None:
    wide = torch.ones(3, 1).expand(3, 4)
    flat, (copy,) = together([wide], [wide])
    flat.add_(1)
    assert copy.tolist() == [[2.0] * 4] * 3 and wide[0, 0] == 1

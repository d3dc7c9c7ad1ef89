"""L0, storage: eight codes in a word. Packing is a permutation of bits, so every comparison is exact."""

from random import Random

import torch
from torch import Tensor
from torch.nn.functional import pad

import miniawq.oracle.cases as cases
import miniawq.oracle.truth as truth
from miniawq.oracle.check import rule
from miniawq.oracle.refused import expect_refused_codes
from miniawq.oracle.subject import Broken, Subject, expect_equal, expect_tensor

KNOWN_WORDS = {
    0x75316420: (0, 1, 2, 3, 4, 5, 6, 7),
    0x86427531: (1, 2, 3, 4, 5, 6, 7, 8),
    0x8ACE9BDF: (15, 14, 13, 12, 11, 10, 9, 8),
    0x88888888: (8, 8, 8, 8, 8, 8, 8, 8),
    0xFFFFFFFF: (15, 15, 15, 15, 15, 15, 15, 15),
    0x00000000: (0, 0, 0, 0, 0, 0, 0, 0),
}


def signed(words: list[int]) -> Tensor:
    """Words [1, W] from 32-bit patterns."""
    return torch.tensor([[word - 2**32 if word >= 2**31 else word for word in words]], dtype=torch.int32)


def widened(target: Subject, codes: Tensor) -> Tensor:
    """The codes, filled up with columns of zeros to a width that the target takes."""
    return pad(codes, (0, -codes.shape[1] % target.limits.multiple_of_n))


def pack(target: Subject, codes: Tensor) -> Tensor:
    """The target's words, of the right dtype and shape."""
    return target.tensor("pack", (codes,), torch.int32, (codes.shape[0], codes.shape[1] // 8))


def unpack(target: Subject, words: Tensor) -> Tensor:
    """The target's codes, of the right dtype and shape."""
    return target.tensor("unpack", (words,), torch.uint8, (words.shape[0], words.shape[1] * 8))


def expect_packed(target: Subject, codes: Tensor) -> None:
    """The words of the definition, from codes that stay as they are."""
    got = expect_tensor(target.pure("pack", codes), torch.int32, (codes.shape[0], codes.shape[1] // 8))
    expect_equal(got, truth.pack(codes), "word")


def expect_unpacked(target: Subject, words: Tensor) -> None:
    """The codes of the definition, from words that stay as they are."""
    got = expect_tensor(target.pure("unpack", words), torch.uint8, (words.shape[0], words.shape[1] * 8))
    expect_equal(got, truth.unpack(words), "code")


@rule("L0.pack.known-words", "pack")
def pack_known_words(target: Subject) -> None:
    """Known codes give the known words: columns 0..7 with codes 0..7 are 0x75316420."""
    for word, codes in KNOWN_WORDS.items():
        given = widened(target, torch.tensor([codes], dtype=torch.uint8))
        expect_equal(pack(target, given)[:, :1], signed([word]), "word")


@rule("L0.unpack.known-words", "unpack")
def unpack_known_words(target: Subject) -> None:
    """Known words give the known codes, with the sign bit set or not."""
    for word, codes in KNOWN_WORDS.items():
        expect_equal(unpack(target, signed([word])), torch.tensor([codes], dtype=torch.uint8), "code")


@rule("L0.pack.every-slot", "pack")
def pack_every_slot(target: Subject) -> None:
    """Each of 16 codes in each of 8 columns lands in its nibble and touches no other."""
    for column in range(8):
        for code in range(16):
            codes = widened(target, torch.zeros(1, 8, dtype=torch.uint8))
            codes[0, column] = code
            expect_equal(pack(target, codes), truth.pack(codes), f"code {code} in column {column}: word")


@rule("L0.unpack.every-slot", "unpack")
def unpack_every_slot(target: Subject) -> None:
    """Each of 16 values in each of 8 nibbles comes out in its column, the top one without its sign."""
    for nibble in range(8):
        for code in range(16):
            words = signed([code << 4 * nibble])
            expect_equal(unpack(target, words), truth.unpack(words), f"code {code} in nibble {nibble}: code")


@rule("L0.pack.random", "pack", codes=cases.code_matrices)
def pack_random(target: Subject, codes: Tensor) -> None:
    """Any codes in any number of rows and words are packed like the definition."""
    target.judge(expect_packed, codes)


@rule("L0.unpack.random", "unpack", words=cases.word_matrices)
def unpack_random(target: Subject, words: Tensor) -> None:
    """Any 32 bits are unpacked like the definition."""
    target.judge(expect_unpacked, words)


@rule("L0.round-trip.codes", "pack", "unpack", codes=cases.code_matrices)
def round_trip_codes(target: Subject, codes: Tensor) -> None:
    """Unpacking what was packed gives the codes back."""
    expect_equal(unpack(target, pack(target, codes)), codes, "code")


@rule("L0.round-trip.words", "pack", "unpack", words=cases.word_matrices)
def round_trip_words(target: Subject, words: Tensor) -> None:
    """Packing what was unpacked gives the words back: all 32 bits are used."""
    expect_equal(pack(target, unpack(target, words)), words, "word")


@rule("L0.pack.wide", "pack", "unpack")
def wide(target: Subject) -> None:
    """Real widths (one row of 5120 columns, 300 rows of 136) are packed and unpacked whole."""
    for rows, columns in ((1, 5120), (300, 136)):
        codes = widened(target, cases.codes(Random(rows), rows, columns))
        target.judge(expect_packed, codes)
        target.judge(expect_unpacked, truth.pack(codes))


@rule("L0.strides", "pack", "unpack")
def strides_of_codes(target: Subject) -> None:
    """A transposed or sliced argument gives what its contiguous copy gives."""
    n = target.limits.multiple_of_n
    codes = cases.codes(Random(1), 2 * n, 3 * n)
    for view in (codes.t()[:, :n], codes[::2], codes[:, 4 : n + 4]):
        target.judge(expect_packed, view)
    words = truth.pack(codes)
    for view in (words.t(), words[::3], words[:, 1:]):
        target.judge(expect_unpacked, view)


@rule("L0.inputs-unchanged", "pack", "unpack")
def codes_and_words_unchanged(target: Subject) -> None:
    """Neither function writes into its argument."""
    codes = cases.codes(Random(2), 4, 2 * target.limits.multiple_of_n)
    words = truth.pack(codes)
    for function, argument in (("pack", codes), ("unpack", words)):
        before = argument.clone()
        target.call(function, argument)
        if not torch.equal(before, argument):
            raise Broken("the argument as it was", f"{function} changed its argument")


@rule("L0.pack.refuses-large-codes", "pack", flags=("NoRangeCheck",))
def refuses_large_codes(target: Subject) -> None:
    """A code above 15 is a ValueError, in any column: it is not smeared over the neighbour, cut or saturated."""
    for code in (16, 17, 128, 255):
        for column in (0, 5, 7):
            codes = widened(target, torch.zeros(2, 8, dtype=torch.uint8))
            codes[1, column] = code
            target.judge(expect_refused_codes, codes, f"code {code}")


@rule("L0.pack.refuses-part-words", "pack", flags=("NoShapeCheck",))
def refuses_part_words(target: Subject) -> None:
    """A number of columns that is no multiple of 8 is a ValueError: nothing is padded or dropped."""
    for columns in (1, 7, 9, 12):
        target.judge(expect_refused_codes, torch.zeros(2, columns, dtype=torch.uint8), f"{columns} columns")

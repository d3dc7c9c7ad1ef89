"""Everything that knows torch.compile, Inductor or Triton. The other rooms use the few names that this file lists.

    prepacked.py   how packed words lie in memory while a model runs, and the way back
    tables.py      how they lie on a CPU where nothing is compiled: as the library's INT4 embeddings
    eager.py       the product of either by plain calls of torch, for any number of rows
    halves.py      the product of a large dense weight of 16 bits on a CPU
    sharing.py     large products of a plain step, shared with threads that no busy processor holds up
    operations.py  a few operations that torch does not have
    gpu_forms.py   the product as expressions that Inductor makes one GPU kernel of each
    cpu_forms.py   the same for a CPU
    launch.py      how those kernels are cut into programs
    workshop.py    what the process knows about its compiler: which threads may use it, and for which forms
    sources.py     what is changed in the Triton sources that Inductor writes
    inductor.py    where private torch is touched: block sizes, lowerings of our operations, kernels
    compiler.py    functions that are compiled, and kept in a file for the next process
    artifacts.py   the directories in which they are kept
    recorded.py    functions of many small operations, launched on a GPU all at once
    products.py    which form multiplies which weight
    proof.py       every form shows once in a process that it is right, or is left out

Tried with torch 2.11 to 2.13 (`workshop.TORCH_VERSIONS`). Outside that window, without a compiler, and wherever a form
is wrong or cannot be built, the product is the plain one, and one warning says so.

Shapes, beside those of the book (CONTRIBUTING.md): P words of one group (S / 8); N nibbles of a word (8); J words, H
halves of words and B bytes of one output; K blocks of W outputs; V parts of a sum, or vectors of words that
one load brings; Q steps of a sum; Y blocks or steps, and U outputs, vectors or groups, of a part; C words of a vector,
copies of activations, pieces of a mean, or tiles of R rows.
"""

from miniawq.compiled.artifacts import are_here, directory_of, identity, kept
from miniawq.compiled.compiler import Compiled, Kept, any_length, own_copy
from miniawq.compiled.eager import (
    CODES_PER_EXPANDED_SLICE,
    Arranged,
    arrange,
    arrange_awq,
    arranged_bytes,
    for_forms,
    multiply_prepacked,
    together,
    unarrange,
)
from miniawq.compiled.gpu_forms import with_rows, written
from miniawq.compiled.halves import PackedHalves, can_pack_halves, halves_product, pack_halves
from miniawq.compiled.prepacked import (
    Prepacked,
    can_prepack,
    join,
    joined,
    lay_together,
    prepack,
)
from miniawq.compiled.products import (
    Form,
    Prepared,
    Product,
    compile_with_forms,
    dense_product,
    in_whole_rows,
    int4_product,
    multiply,
    prepare,
    prepare_normed,
)
from miniawq.compiled.proof import check
from miniawq.compiled.recorded import Recorded
from miniawq.compiled.sharing import hand_out, shared_step
from miniawq.compiled.tables import Table
from miniawq.compiled.workshop import WORKSHOP, first_line

__all__ = [
    "CODES_PER_EXPANDED_SLICE",
    "WORKSHOP",
    "Arranged",
    "Compiled",
    "Form",
    "Kept",
    "PackedHalves",
    "Prepacked",
    "Prepared",
    "Product",
    "Recorded",
    "Table",
    "any_length",
    "are_here",
    "arrange",
    "arrange_awq",
    "arranged_bytes",
    "can_pack_halves",
    "can_prepack",
    "check",
    "compile_with_forms",
    "dense_product",
    "directory_of",
    "first_line",
    "for_forms",
    "halves_product",
    "hand_out",
    "identity",
    "in_whole_rows",
    "int4_product",
    "join",
    "joined",
    "kept",
    "lay_together",
    "multiply",
    "multiply_prepacked",
    "own_copy",
    "pack_halves",
    "prepack",
    "prepare",
    "prepare_normed",
    "shared_step",
    "together",
    "unarrange",
    "with_rows",
    "written",
]

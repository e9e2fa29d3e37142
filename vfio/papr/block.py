"""An RTAS call as a guest makes it: a block in its memory, whose address is all that comes with the hypercall.

The block is words of 32 bits, big-endian: the token of the call, how many arguments, how many results, the arguments, and
room for the results.  Source: hw/ppc/spapr_rtas.c and spapr_hcall.c of QEMU; struct rtas_args in
arch/powerpc/include/asm/rtas-types.h.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vfio.papr.numbers import MAX_RTAS_WORDS, Hcall, Rtas

if TYPE_CHECKING:
    from vfio.papr.phb import Phb

_HEAD = 12
_WORD = 4


def call(phb: Phb, arguments: Sequence[int]) -> int:
    """Make the call in the block at the only argument; the code of the hypercall.

    H_PARAMETER where that is no block in the memory of the guest, and for a token that is no call's; what went wrong with
    a call is the first of its results.
    """
    if len(arguments) != 1:
        return Hcall.PARAMETER
    try:
        return _made(phb, arguments[0])
    except LookupError:
        return Hcall.PARAMETER
    except OSError:  # the memory of the guest was closed
        return Hcall.HARDWARE


def _made(phb: Phb, at: int) -> int:
    token, count, results = struct.unpack(">3I", phb.memory.read(at, _HEAD))
    if count + results > MAX_RTAS_WORDS:
        return Hcall.PARAMETER
    # All of it is looked for before the call is made: what cannot be answered is not done.
    words = struct.unpack(f">{count + results}I", phb.memory.read(at + _HEAD, _WORD * (count + results)))
    name = next((name for name, each in phb.tokens.items() if each == token), None)
    no_call = [int(Rtas.PARAMETER_ERROR)][:results]
    answer = no_call if name is None else phb.rtas(name, *words[:count], results=results)
    data = struct.pack(f">{len(answer)}I", *(word & 0xFFFFFFFF for word in answer))
    phb.memory.write(at + _HEAD + _WORD * count, data)
    return Hcall.PARAMETER if name is None else Hcall.SUCCESS

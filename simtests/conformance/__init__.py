"""Conformance: cases that hold on every VFIO kernel.  Here they run on the fake, in `hwtests` on real ones.

A case knows only the seam (or the library above it) and the fixtures `target`, `backend`, `program`, `member`,
`second`, `another_process` and what is made of them; where kernels differ, `target` names the property.
"""

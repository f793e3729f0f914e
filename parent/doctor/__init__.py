"""``strongroom doctor``: what hinders an enclave on this machine, and what to do about it.

:mod:`parent.doctor.host` is all that a check knows of the machine; a check is a function of it and of what is wanted.
"""

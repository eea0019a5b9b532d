"""Compiled C: what torch has no fast function for.

``compiler`` builds a C file on this machine when it is first needed, ``cuda`` one for its GPU; each
lies beside the Python that calls it.  ``lossprune.h`` is what the files share, ``interface`` what
they and that Python agree on.
"""

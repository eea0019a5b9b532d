"""Compiled C: what torch has no fast function for.

``compiler`` builds a C file on this machine when it is first needed; the packages that use it keep
their C files here.
"""

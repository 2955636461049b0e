"""The methods, in the folders of the survey's taxonomy; one file each, found by the registry.

Importing this package binds it to the name ``methods`` in ``deltaworks``, where the function of that name is public;
so the package can be called as that function.
"""

import sys
import types


class _Listing(types.ModuleType):
    def __call__(self, pattern: str = "*") -> list[str]:
        from deltaworks.core.registry import methods

        return methods(pattern)


sys.modules[__name__].__class__ = _Listing

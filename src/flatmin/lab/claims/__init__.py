"""Claims of the papers, put to the test on real data: a claim, comparisons that test it, a verdict by a rule."""

from flatmin.lab.claims.claim import Claim, judge, verdict
from flatmin.lab.claims.of_papers import CLAIMS

__all__ = ["CLAIMS", "Claim", "judge", "verdict"]

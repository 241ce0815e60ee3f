"""`narrows demo`: a real network from training to a smaller artifact, with every number measured.

A small residual network with a concat branch learns scikit-learn's handwritten digits. The demo
then captures it, plans, prunes, exports, fine-tunes what is left, and turns that into integers.
`narrows.demo.story` tells it in order.
"""

from narrows.demo.story import main, run

__all__ = ["main", "run"]

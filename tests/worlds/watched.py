"""Progress that a test listens to."""

from qquant.progress import Quiet


class Watched(Quiet):
    """Calls `heard(phase, done, of)` for every step."""

    def __init__(self, heard):
        self.heard = heard

    def advance(self, phase, done, of):
        self.heard(phase, done, of)

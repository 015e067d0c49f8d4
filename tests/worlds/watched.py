"""Progress that a test listens to, and what all work must tell."""

from qquant.progress import Quiet


class Watched(Quiet):
    """Calls `heard(phase, done, of)` for every step."""

    def __init__(self, heard):
        self.heard = heard

    def advance(self, phase, done, of):
        self.heard(phase, done, of)


class Told(Quiet):
    """Keeps what was told: the steps of each phase in their order, and what was worked on within them."""

    def __init__(self):
        self.steps, self.within = {}, {}
        self.phase = ""

    def advance(self, phase, done, of):
        self.phase = phase
        self.steps.setdefault(phase, []).append((done, of))

    def at(self, what):
        self.within.setdefault(self.phase, []).append(what)

    def require_whole(self, *phases):
        """Every phase begins with 0, and ends; so nobody waits for its first step without a word."""
        assert list(self.steps) == list(phases)
        for phase, steps in self.steps.items():
            assert steps[0][0] == 0, f"{phase} begins with {steps[0]}"
            assert steps[-1][0] == steps[-1][1], f"{phase} ends with {steps[-1]}"

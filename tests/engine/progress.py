"""A `Progress` that remembers what it was told."""


class Recorder:
    def __init__(self) -> None:
        self.stages: list[str] = []
        self.advanced = 0

    def start(self, stage: str, total: int | None = None, unit: str = "") -> None:
        del total, unit
        self.stages.append(stage)

    def advance(self, amount: int = 1) -> None:
        self.advanced += amount

    def note(self, message: str) -> None:
        del message

    def finish(self) -> None:
        pass

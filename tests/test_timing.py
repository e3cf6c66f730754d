"""The timer, with a clock in a device's place."""

from types import SimpleNamespace

from cupyattn.timing import EventTimer


def test_the_timer_counts_flushes_into_its_time_but_not_into_the_figure():
    class Clock:
        """A device on which a flush takes 3 ms and a call 1 ms."""

        now = 0.0
        calls = 0

        def alloc(self, size):
            return self

        def memset_async(self, value, size):
            self.now += 3.0

        def Event(self):
            clock = self

            class Event:
                def record(self):
                    self.at = clock.now

                def synchronize(self):
                    pass

            return Event()

        def get_elapsed_time(self, start, stop):
            return stop.at - start.at

    clock = Clock()

    def call():
        clock.now += 1.0
        clock.calls += 1

    timer = EventTimer(SimpleNamespace(cuda=clock))
    assert timer(call, warmup_ms=40.0, measure_ms=80.0) == 1.0
    assert 1 + 5 + 10 + 20 <= clock.calls <= 1 + 5 + 12 + 24  # the first of five flushes is before the first event

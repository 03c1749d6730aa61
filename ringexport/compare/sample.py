"""A page of prose and code, for comparisons that were given no text."""

__all__ = ["SAMPLE_TEXT"]

SAMPLE_TEXT = '''\
The lighthouse keeper counted the waves out of habit. Every seventh one, his father had told him,
carries news from the open sea, and although he had never believed it, he still paused when it
broke. That evening the seventh wave brought a bottle, green and half filled with sand. Inside was
no letter, only a small brass key. "Somebody wants a door opened," he said to the gull on the rail,
"and has forgotten to say which one."

He tried the key on the oil cabinet, on the chest under the stairs, and on the clock that had
stopped in 1931. It fitted none of them. Numbers have no such secrets: 3, 5, 8, 13, 21 and 34 follow
a rule that a child can find, and the rule is easier to write down than to forget.

```python
def fibonacci(limit):
    """Yield the Fibonacci numbers below `limit`."""
    a, b = 1, 2
    while a < limit:
        yield a
        a, b = b, a + b


print(sum(x for x in fibonacci(4_000_000) if x % 2 == 0))
```

Water boils at 100 degrees Celsius at sea level, and at about 93 degrees on a mountain of 2,000
metres, because the air presses less. Tea made up there is weaker. Whether the keeper ever found
the door is not known; the station was automated the year after, and the key hangs in a museum in
a glass case, between a barometer and a pair of boots.
'''

"""Names in HTTP by which a service knows clients and requests apart: they take turns, and may ask how far theirs is."""

from __future__ import annotations

CLIENT_HEADER = "X-Tropd-Client"
"""Name of the client, of its own choice: clients take turns in the queue."""
ALONE_HEADER = "X-Tropd-Alone"
"""Set by a client whose requests are not to be scored together with others: what shares a pass changes its rounding."""
REQUEST_HEADER = "X-Tropd-Request"
"""Name of the request, of the client's choice, while it is under way."""
QUEUE_HEADER = "X-Tropd-Queue-Ms"
"""Of an answer: milliseconds that its request waited for its turn."""
REQUESTS_PATH = "/v1/requests"
"""``GET`` of this and a request's name tells its state."""
QUEUED, WORKING = "queued", "working"

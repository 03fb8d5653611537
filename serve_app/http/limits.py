"""What one request may ask of the service, documented for clients. The engine has bounds of its own: engine.request."""

MAX_BODY_BYTES = 32 * 2**20
MAX_HEADER_BYTES = 64 * 2**10  # request target and all header fields together
MAX_JSON_DEPTH = 64
MAX_JSON_CONTAINERS = 100_000  # objects and arrays of one body: each costs far more memory than its two bytes

MAX_N = 128  # choices for one prompt
MAX_CHOICES = 1024  # prompts × n of one request
MAX_STOP_CHARS = 1024  # length of one stop string: that much text is held back while it may still match
MAX_TOKEN_LIST = 1024  # entries of logit_bias, of stop_token_ids
MAX_METADATA = 16  # entries of metadata
MAX_TOKEN_ID = 2**31 - 1  # ids travel as signed 32-bit integers; the model's own bound is checked at admission
MAX_COUNT = 2**31 - 1  # of anything that counts tokens
MAX_PRIORITY = 2**31 - 1  # in either direction

READINESS_TIMEOUT_S = 5.0

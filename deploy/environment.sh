# What every shell on a node of a `ray up` cluster has before `ray start`, `serve` and the rest run: all nodes alike.
export PATH="$HOME/venv/bin:$PATH"

# Without a token, whoever reaches Ray's ports runs code. Ray reads the token from ~/.ray/auth_token.
export RAY_AUTH_MODE=token

# HAProxy in front, replicas that talk to each other over gRPC: 4 to 5 times the streams of Serve's defaults.
export RAY_SERVE_ENABLE_HA_PROXY=1
export RAY_SERVE_THROUGHPUT_OPTIMIZED=1
# A request's line and headers must fit this buffer: the API takes 64 KiB of them, HAProxy's default is 16 KiB.
export RAY_SERVE_HAPROXY_TUNE_BUFSIZE=81920
# Seconds after which a client that takes nothing of what is ready for it is dropped, and its request freed; Ray's
# default is an hour. A client that waits for an answer, or between two tokens, is not concerned.
export RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S=120
# HAProxy is to read requests whole: else it overlooks some clients that leave, whose answers are then computed to their
# end. Serve has no setting for that, but copies this one into HAProxy's configuration as it is.
export RAY_SERVE_HAPROXY_BALANCE_ALGORITHM=$'leastconn\n    option http-buffer-request'
# How long an answer may go on when HAProxy has been restarted, as it is whenever an ingress comes or goes.
export RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S=3600

# Filled by `slipstream compile` when a GPU node is set up; engines then compile nothing.
export TRITON_CACHE_DIR="$HOME/kernels"

"""Load on Switchboard from Locust, over WebSocket and REST.

TOKENS names a file of access tokens, one a line. Choose users by name, or get all of them:

    TOKENS=tokens.txt locust -f load/locust/locustfile.py --host http://127.0.0.1:8000 EchoUser
"""

import itertools
import json
import os
import time
import uuid

import websocket
from locust import FastHttpUser, User, constant, task

with open(os.environ.get("TOKENS", "tokens.txt"), encoding="utf-8") as file:
    TOKENS = itertools.cycle([line.strip() for line in file if line.strip()])


class Refused(Exception):
    """An answer that is no success."""


class WebSocketUser(User):
    """A user with one connection, which asks and waits for the answer."""

    abstract = True
    wait_time = constant(0)

    def on_start(self):
        self.token = next(TOKENS)
        self.connect()

    def on_stop(self):
        self.leave()

    def leave(self):
        """Closes without waiting for the server's close frame: that wait would outlive the test."""
        self.socket.send_close()
        self.socket.shutdown()

    def connect(self):
        with self.timed("connect"):
            url = self.host.replace("http", "ws", 1) + "/web"
            self.socket = websocket.create_connection(
                url, timeout=30, header={"Authorization": f"Bearer {self.token}"}
            )
            first = json.loads(self.socket.recv())
            if first["type"] != "auth_ok":
                raise Refused(first)

    def call(self, name, pkg_id, data):
        """The answer to a request; pushes that come before it are passed over."""
        req_id = str(uuid.uuid4())
        with self.timed(name):
            self.socket.send(json.dumps({"pkg_id": pkg_id, "req_id": req_id, "data": data}))
            while True:
                answer = json.loads(self.socket.recv())
                if answer.get("req_id") == req_id:
                    break
            if answer["status_code"] != 0:
                raise Refused(answer["data"]["code"])
            return answer["data"]

    def timed(self, name):
        return Timed(self.environment, name)


class Timed:
    """Tells Locust how long its block took, and what went wrong in it."""

    def __init__(self, environment, name):
        self.environment, self.name = environment, name

    def __enter__(self):
        self.start = time.perf_counter()

    def __exit__(self, _type, error, _trace):
        if error is not None and not isinstance(error, Exception):
            # The test is over.
            return False
        self.environment.events.request.fire(
            request_type="WS",
            name=self.name,
            response_time=(time.perf_counter() - self.start) * 1000,
            response_length=0,
            exception=error,
            context={},
        )
        # A refusal is counted, and the user goes on; a broken connection ends its task.
        return isinstance(error, Refused)


class EchoUser(WebSocketUser):
    """Echoes, as soon as they are answered."""

    @task
    def echo(self):
        sent = {"i": time.time()}
        echoed = self.call("ECHO", 100, sent)
        assert echoed in (None, sent), echoed


class AuthorsUser(WebSocketUser):
    """Nine pages are read for each author that is made."""

    @task(9)
    def read(self):
        self.call("GET_PAGINATED_AUTHORS", 2, {"per_page": 20})

    @task(1)
    def create(self):
        self.call("CREATE_AUTHOR", 3, {"name": f"Locust {uuid.uuid4()}"})


class ReconnectUser(WebSocketUser):
    """Connects, asks once, leaves, and comes again at once."""

    @task
    def reconnect(self):
        self.call("ECHO", 100, {})
        self.leave()
        self.connect()


class RestUser(FastHttpUser):
    """The authors over REST."""

    wait_time = constant(0)

    def on_start(self):
        self.headers = {"Authorization": f"Bearer {next(TOKENS)}"}

    @task(9)
    def read(self):
        self.client.get("/authors/paginated", headers=self.headers)

    @task(1)
    def create(self):
        name = {"name": f"Locust {uuid.uuid4()}"}
        self.client.post("/authors", json=name, headers=self.headers)

"""schemathesis (PyPI) against `hull api` and the document that it gives of itself at /openapi.json.

    schema.py HULL KERNEL not-started|running

Requests are made up from the document, fitting and not, and answers are held against it: no status
of 500 and more, none that the document does not name, no body that is not as it says. Runs as root
in a network namespace of its own: schemathesis speaks TCP only, and reaches the socket through a
forwarder on the loopback. Left out are streams, which have no end, and the action that ends the process.
"""

import http.client
import json
import os
import pathlib
import selectors
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time

hull, kernel, wanted = sys.argv[1:]
here = pathlib.Path(tempfile.mkdtemp())
path = str(here / "api.sock")

# All that can be found out by answers and bodies. The others of schemathesis' checks take it that
# a request which fits the document always succeeds, and that one which does not never does: whether
# a file exists, and in which state a machine is, is not the document's to say. Nor is a PUT of
# /drives without an id, which Firecracker and Hull refuse as a bad request, a method of /drives.
CHECKS = ",".join(
    [
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_headers_conformance",
        "response_schema_conformance",
    ]
)

HOOKS = """
import schemathesis


@schemathesis.hook
def before_load_schema(context, document):
    document["components"]["schemas"]["ActionType"]["enum"].remove("Quit")
"""


class Forwarder(socketserver.BaseRequestHandler):
    """One connection, byte by byte in both directions until either side closes."""

    def handle(self):
        with socket.socket(socket.AF_UNIX) as behind, selectors.DefaultSelector() as ready:
            if behind.connect_ex(path) != 0:
                return
            ready.register(self.request, selectors.EVENT_READ, behind)
            ready.register(behind, selectors.EVENT_READ, self.request)
            while True:
                for key, _ in ready.select():
                    try:
                        data = key.fileobj.recv(65536)
                        if not data:
                            return
                        key.data.sendall(data)
                    except OSError:
                        return


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64


def ask(method, target, body=None):
    connection = http.client.HTTPConnection("localhost", timeout=10)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(path)
    connection.request(method, target, body if body is None else json.dumps(body))
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, content


def expect(status, method, target, body=None):
    answer = ask(method, target, body)
    assert answer[0] == status, f"{method} {target}: {answer}"
    return answer[1]


subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
subprocess.run(["ip", "tuntap", "add", "tap0", "mode", "tap"], check=True)
console = open(here / "console", "wb")
process = subprocess.Popen(
    [hull, "api", "--sock", path],
    stdin=subprocess.DEVNULL,
    stdout=console,
    stderr=console,
    env={**os.environ, "XDG_RUNTIME_DIR": str(here)},
)
deadline = time.monotonic() + 20
while not os.path.exists(path):
    assert time.monotonic() < deadline and process.poll() is None, "no socket"
    time.sleep(0.01)

if wanted == "running":
    with open(here / "disk", "wb") as disk:
        disk.truncate(1 << 20)
    expect(204, "PUT", "/boot-source", {"kernel_image_path": kernel, "boot_args": "payload=spin"})
    drive = {"drive_id": "d", "path_on_host": str(here / "disk"), "is_root_device": False}
    expect(204, "PUT", "/drives/d", drive)
    expect(204, "PUT", "/network-interfaces/e", {"iface_id": "e", "host_dev_name": "tap0"})
    expect(204, "PUT", "/vsock", {"guest_cid": 3, "uds_path": str(here / "vsock")})
    balloon = {"amount_mib": 0, "deflate_on_oom": True, "stats_polling_interval_s": 1}
    expect(204, "PUT", "/balloon", balloon)
    expect(204, "PUT", "/entropy", {})
    expect(204, "PUT", "/mmds/config", {"network_interfaces": ["e"], "version": "V2"})
    expect(204, "PUT", "/actions", {"action_type": "InstanceStart"})

forwarder = Server(("127.0.0.1", 0), Forwarder)
threading.Thread(target=forwarder.serve_forever, daemon=True).start()
address = f"http://127.0.0.1:{forwarder.server_address[1]}"
(here / "hooks.py").write_text(HOOKS)
document = json.loads(expect(200, "GET", "/openapi.json"))
streams = [p for p in document["paths"] if p.endswith("/events")]

status = subprocess.run(
    [
        os.path.join(os.path.dirname(sys.executable), "schemathesis"),
        "run",
        f"{address}/openapi.json",
        f"--url={address}",
        f"--checks={CHECKS}",
        "--phases=examples,coverage,fuzzing,stateful",
        f"--max-examples={os.environ.get('SCHEMA_EXAMPLES', '40')}",
        "--seed=1",
        "--generation-database=none",
        "--suppress-health-check=all",
        "--request-timeout=10",
        "--no-color",
        *[f"--exclude-path={stream}" for stream in streams],
    ],
    cwd=here,
    env={**os.environ, "SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": str(here)},
).returncode

# It has been through a lot, and is what it was.
code = process.poll()
assert code is None, f"the process has ended with {code}: {(here / 'console').read_text()}"
state = json.loads(expect(200, "GET", "/"))["state"]
assert state in (("Running", "Paused") if wanted == "running" else ("Not started",)), state
process.terminate()
process.wait(20)
sys.exit(status)

"""hysn-firecracker-python (PyPI), unmodified, from its create() to its delete().

    hysn.py FIRECRACKER KERNEL

It looks for its program in /usr/local/bin and keeps its machines in /var/lib/firecracker: this runs
as root in mount and network namespaces of its own, where both are empty file systems. It asks a
Docker daemon for its version before it does anything; a few lines here are that daemon. Its firewall
rules it makes with Debian's python3-nftables.
"""

import json
import os
import signal
import socketserver
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler

program, kernel = sys.argv[1:]
here = os.getcwd()


def run(*command):
    subprocess.run(command, check=True)


run("mount", "-t", "tmpfs", "tmpfs", "/usr/local/bin")
run("mount", "-t", "tmpfs", "tmpfs", "/var/lib")
os.symlink(program, "/usr/local/bin/firecracker")
os.mkdir("/var/lib/firecracker")
# The default route, of which it takes the interface's name.
run("ip", "tuntap", "add", "up0", "mode", "tap")
run("ip", "address", "add", "192.0.2.2/24", "dev", "up0")
run("ip", "link", "set", "up0", "up")
run("ip", "route", "add", "default", "via", "192.0.2.1")


class Docker(BaseHTTPRequestHandler):
    """A daemon that has a version and nothing else."""

    def do_GET(self):
        body = json.dumps({"Version": "27.0.0", "ApiVersion": "1.43"}).encode()
        self.send_response(200 if self.path.endswith("/version") else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def address_string(self):
        return "client"

    def log_message(self, *_):
        pass


docker = socketserver.UnixStreamServer(f"{here}/docker.sock", Docker)
threading.Thread(target=docker.serve_forever, daemon=True).start()
os.environ["DOCKER_HOST"] = f"unix://{here}/docker.sock"

from firecracker import MicroVM  # noqa: E402: what it needs is there only now
from firecracker.api import Api  # noqa: E402

with open(f"{here}/disk.img", "wb") as disk:
    disk.truncate(1 << 20)

machine = MicroVM(
    name="guest",
    kernel_file=kernel,
    base_rootfs=f"{here}/disk.img",
    vcpu=2,
    memory="128M",
    mmds_enabled=True,
    user_data="#cloud-config\n",
    vsock_enabled=True,
    # The one thing in its boot arguments that is free to choose.
    init_file="/sbin/init payload=spin",
    labels={"role": "test"},
)
answer = machine.create()
assert answer.endswith("created"), answer
id = machine.inspect()["ID"]
folder = f"/var/lib/firecracker/{id}"
process = machine.inspect()["State"]["Pid"]
assert [seen["id"] for seen in MicroVM.list()] == [id], MicroVM.list()
assert machine.find(state="Running", labels={"role": "test"})

deadline = time.monotonic() + 20
while "hello" not in open(f"{folder}/firecracker.log").read():
    assert time.monotonic() < deadline, "the guest says nothing"
    time.sleep(0.05)

config = machine.config()
assert config["machine-config"]["vcpu_count"] == 2, config
assert config["drives"][0]["drive_id"] == "rootfs", config
assert config["network-interfaces"][0]["iface_id"] == "eth0", config
assert config["vsock"]["guest_cid"] == 3, config
assert config["mmds-config"]["version"] == "V2", config

api = Api(f"{folder}/firecracker.socket")


def state():
    return api.describe.get().json()["state"]


assert api.describe.get().json()["id"] == id
assert api.version.get().json()["firecracker_version"] == "1.12.1"
assert api.mmds.get().json()["latest"]["user-data"] == "#cloud-config\n"
assert state() == "Running"
assert "paused" in machine.pause()
assert state() == "Paused"
assert "resumed" in machine.resume()
assert state() == "Running"
api.close()

# Somebody has to take note of the child's end, or it seems to be alive.
ends = []
threading.Thread(target=lambda: ends.append(os.waitpid(process, 0)[1]), daemon=True).start()
answer = machine.delete()
assert answer.endswith("is deleted"), answer
assert not os.path.exists(folder), os.listdir(folder)
assert MicroVM.list() == []
code = os.waitstatus_to_exitcode(ends[0])
assert code in (-signal.SIGTERM, 128 + signal.SIGTERM), code
print("created, paused, resumed and deleted")

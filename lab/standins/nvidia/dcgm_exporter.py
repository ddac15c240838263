#!/usr/bin/python3
"""dcgm-exporter on a lab host: serves what nvidia-smi says of its GPUs as the metrics of DCGM.

Address, counters and the form of a metric are those of NVIDIA's exporter. Without a driver that answers
it ends with status 1, as that does.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

VERSION = "@VERSION@"
NVIDIA_SMI = os.environ.get("LAB_NVIDIA_SMI", "/usr/bin/nvidia-smi")

# What nvidia-smi calls what DCGM calls so.
FIELDS = {
    "DCGM_FI_DEV_GPU_TEMP": "temperature.gpu",
    "DCGM_FI_DEV_POWER_USAGE": "power.draw",
    "DCGM_FI_DEV_GPU_UTIL": "utilization.gpu",
    "DCGM_FI_DEV_FB_FREE": "memory.free",
    "DCGM_FI_DEV_FB_USED": "memory.used",
}
IDENTITY = ("index", "uuid", "pci.bus_id", "name", "driver_version")


def counters(path: Path) -> list[tuple[str, str, str]]:
    """Field, type and help of each metric that is asked for and known here."""
    found = []
    for line in path.read_text().splitlines():
        name, _, rest = line.partition(",")
        kind, _, about = rest.partition(",")
        if name in FIELDS:
            found.append((name, kind.strip(), about.strip()))
    return found


def gpus(fields: list[str]) -> list[dict[str, str]]:
    """What nvidia-smi says of each GPU. Raises OSError with its words where it does not answer."""
    asked = [*IDENTITY, *fields]
    done = subprocess.run(
        [NVIDIA_SMI, f"--query-gpu={','.join(asked)}", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise OSError(" ".join((done.stdout + done.stderr).split()))
    rows = [line.split(", ") for line in done.stdout.splitlines()]
    return [dict(zip(asked, row, strict=True)) for row in rows]


def metrics(wanted: list[tuple[str, str, str]]) -> str:
    """The exposition text."""
    rows = gpus([FIELDS[name] for name, _, _ in wanted])
    text = []
    for name, kind, about in wanted:
        text += [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
        for row in rows:
            labels = {
                "gpu": row["index"],
                "UUID": row["uuid"],
                "pci_bus_id": row["pci.bus_id"],
                "device": f"nvidia{row['index']}",
                "modelName": row["name"],
                "Hostname": socket.gethostname(),
                "DCGM_FI_DRIVER_VERSION": row["driver_version"],
            }
            words = ",".join(f'{key}="{value}"' for key, value in labels.items())
            text.append(f"{name}{{{words}}} {row[FIELDS[name]]}")
    return "\n".join([*text, ""])


def main(arguments: list[str]) -> int:
    """Serve until SIGTERM; status 1 where no GPU answers or the address cannot be had."""
    parser = argparse.ArgumentParser(prog="dcgm-exporter")
    parser.add_argument("-a", "--address", default=os.environ.get("DCGM_EXPORTER_LISTEN", ":9400"))
    parser.add_argument("-f", "--collectors", type=Path)
    parser.add_argument("--version", action="version", version=f"DCGM Exporter version {VERSION}")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    wanted = counters(options.collectors)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.path == "/metrics"
            text = metrics(wanted) if known else "404 page not found\n"
            self.send_response(200 if known else 404)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            """A scrape is nothing to write down."""

    host, _, port = options.address.rpartition(":")
    try:
        metrics(wanted)
        server = ThreadingHTTPServer((host.strip("[]"), int(port)), Handler)
    except OSError as error:
        print(f'level=ERROR msg="Failed to start: {error}"', file=sys.stderr, flush=True)
        return 1
    print('level=INFO msg="Starting webserver"', flush=True)
    server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

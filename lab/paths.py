"""Where the lab keeps what it makes.

Three places, by how long they have to last:

`STATE`    the hosts themselves: their disks, keys, simulated hardware, logs. `lab down` leaves the
           disks, so that the next `lab up` boots the same hosts; `lab down --purge` removes all.
`CACHE`    what is expensive and can be made again: the hosts' base system, the site's repositories.
`CONTROL`  what the machine that runs pyinfra needs to reach the hosts: a key, their public keys.

`LAB_STATE` and `LAB_CACHE` move the first two; they must be absolute and not on an overlay file
system, because each host's disk is an overlay of its own.
"""

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent

STATE = Path(os.environ.get("LAB_STATE") or "/var/lib/minimax-fleet-lab")
CACHE = Path(os.environ.get("LAB_CACHE") or "/var/cache/minimax-fleet-lab")
CONTROL = REPOSITORY / ".lab"

# What the control machine needs to reach the hosts.
CONTROL_KEY = CONTROL / "id_ed25519"
KNOWN_HOSTS = CONTROL / "known_hosts"
SSH_CONFIG = CONTROL / "ssh_config"

# One directory per host: disk, keys, hardware, console log.
HOSTS = STATE / "hosts"

# The hosts' common base system, one directory per digest of its recipe.
BASE = CACHE / "base"

# What the site host serves, mounted there read-only as /srv/site.
SITE_ROOT = CACHE / "site"
SITE_KEY = SITE_ROOT / "keys" / "lab.asc"

# What the site host was asked, mounted there as /var/log/site.
SITE_LOG = STATE / "site-log"
REQUESTS = SITE_LOG / "requests.jsonl"

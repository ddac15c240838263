"""B20: what a process really got as argv is what the plan says, whatever is in it."""

from __future__ import annotations

import json

from tests.lab.conftest import CPU, H20
from tests.lab.site import Site, argv_of, main_pids

# Every character that systemd, a shell or JSON could trip over.
NASTY = {"quote": 'it\'s "so"', "percent": "100%i %%", "dollar": "$HOME ${PATH}", "emoji": "🚀\n\\"}


def assert_argv_is_the_plans(site: Site, host: str) -> None:
    pids = main_pids(host)
    for service in site.plans().plans[host].services:
        found = argv_of(host, pids[service.unit])
        # The kernel puts the interpreter of the program's first line before it.
        assert tuple(found[-len(service.argv) :]) == service.argv


def test_every_service_runs_the_plans_argv(served: Site) -> None:
    for host in (*H20, CPU):
        assert_argv_is_the_plans(served, host)


def test_b20_nothing_in_a_value_is_lost_or_expanded(gpu_site: Site) -> None:
    gpu_site.set_in_services("h20", f'"args": {{"override-generation-config": {NASTY!r}}}')

    gpu_site.roll_out_well("--limit", H20[0])

    assert_argv_is_the_plans(gpu_site, H20[0])
    argv = argv_of(H20[0], main_pids(H20[0])["minimax-m25-a.service"])
    assert json.loads(argv[argv.index("--override-generation-config") + 1]) == NASTY

"""pyinfra's configuration, and what it would let pass: read before the inventory and any host."""

from pyinfra import config

from fleet.run import begin

config.REQUIRE_PYINFRA_VERSION = ">=3.10,<4"
# One failed host ends the run: what comes after it in the order is never touched.
config.FAIL_PERCENT = 0

begin()

"""The roll-out as a table of contents: each line is true of every host before the next begins.

pyinfra inventories/h20.py deploy.py
"""

from tasks import driver, health, monitoring, preflight, rollout, runtime, service, system, weights

preflight.check()  # everything that is wrong, at once, before anything is changed
system.install()  # mirrors, packages, user, directories, limits
driver.install()  # NVIDIA driver and fabric manager at one version, held
runtime.install()  # uv, Python, vLLM: built beside what runs
weights.fetch()  # the models at their revisions, every hash verified
service.stage()  # units, secrets, proxy: beside what runs
rollout.cut_over()  # canary, then batches: drain, switch, start, gate; or back
health.check()  # a real answer from every public port
monitoring.install()  # metrics of the GPUs, where the site wants them

# SPDX-License-Identifier: GPL-2.0-or-later
# `make demo` and `make test` do everything on a bare Debian 12, as root.

PY := .venv/bin/python
STAMP := build/.setup
# The tests of the alerts need promtool. Debian has it in `prometheus`, which would also install a
# service and what its pages need: the package (19 MB) is unpacked here instead.
PROMTOOL := build/prometheus/usr/bin/promtool
PACKAGES := python3-bpfcc python3-venv linux-headers-amd64 clang-format-14 gcc libc6-dev \
	qemu-system-x86 iproute2 busybox-static cpio tcpdump ethtool iperf3 openssl etcd-server procps make git \
	systemd-container mmdebstrap qemu-utils e2fsprogs
TESTS ?=
# Tests that need the kernel, QEMU or real time. The others, and tests of two whole hosts, run
# beside them at a lower priority.
KERNEL_TESTS := tests/bench tests/bpf tests/netns tests/e2e tests/lease
# Tests of the pure packages, for the loop while writing
CHECK_TESTS := $(addprefix tests/unit/,compare conntrack engine net offload test_abi.py test_layers.py)
N ?=
# What `make deb` needs besides, those of Build-Depends in deploy/debian/control and a checker
DEB_PACKAGES := dpkg-dev debhelper lintian bash-completion python3-click python3-rich python3-shellingham \
	python3-typing-extensions
# What `make test-tunnel` unpacks: tunnels, their tools, and libraries that only these need
TUNNEL_PACKAGES := wireguard-go wireguard-tools strongswan-charon strongswan-libcharon strongswan-swanctl \
	libstrongswan libstrongswan-standard-plugins libcharon-extra-plugins nftables libnftables1 libnftnl11
DEB := build/deb
DESTDIR ?=
PREFIX ?= /usr
INSTALLED := $(PREFIX)/lib/colo-xdp

export DEBIAN_FRONTEND := noninteractive

.PHONY: all help setup demo check test test-lower-bounds test-qemu-11 test-deb-13 test-page test-tunnel torture stress chaos \
	incidents fuzz bench docs layers lint format hooks clean install uninstall deb

all: test

# Print this list
help:
	@awk '/^# /{if (text == "") text = substr($$0, 3)} /^[a-z0-9-]+:( |$$)/{split($$1, t, ":"); \
		if (text != "" && t[1] != "all") printf "make %-18s %s\n", t[1], text; text = ""} \
		!/^#/{text = ""}' Makefile

# Install what the other targets need: Debian packages (as root), .venv
setup: $(STAMP)

$(PROMTOOL):
	@mkdir -p build/prometheus
	@if command -v promtool > /dev/null; then mkdir -p $(@D) && ln -sf "$$(command -v promtool)" $@; else \
		apt-get update -q > /dev/null; cd build/prometheus && apt-get download -q prometheus && \
		dpkg-deb -x prometheus_*.deb . && rm -f prometheus_*.deb usr/bin/prometheus; fi

$(STAMP): pyproject.toml Makefile
	@mkdir -p build
	@missing=$$(for p in $(PACKAGES); do dpkg-query -W -f '$${Status}\n' $$p 2>/dev/null | \
		grep -q '^install ok installed' || echo $$p; done | tr '\n' ' '); \
	if [ -n "$${missing% }" ]; then \
		if [ "$$(id -u)" != 0 ]; then echo "as root: apt-get install $$missing"; exit 1; fi; \
		apt-get update && apt-get install -y --no-install-recommends $$missing; \
	fi
	@[ -x $(PY) ] || /usr/bin/python3 -m venv --system-site-packages .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

# Build the package for Debian 12 and 13 in build/deb (as root the first time)
# Two builds of one commit are the same, byte for byte.
deb: build/.setup-deb $(DEB)/vendored/.complete
	rm -rf $(DEB)/src $(DEB)/*.deb
	mkdir -p $(DEB)/src/tests
	cp -r bpf colo_xdp deploy docs README.md ARCHITECTURE.md CONTRIBUTING.md CHANGELOG.md $(DEB)/src
	cp -r tests/__init__.py tests/docs $(DEB)/src/tests
	cp -r $(DEB)/vendored $(DEB)/src
	mv $(DEB)/src/deploy/debian $(DEB)/src
	export SOURCE_DATE_EPOCH=$${SOURCE_DATE_EPOCH:-$$(git log -1 --format=%ct || stat -c %Y CHANGELOG.md)} && \
		cd $(DEB)/src && python3 debian/package.py changelog CHANGELOG.md > debian/changelog && \
		dpkg-buildpackage --build=binary --no-sign
	rm -rf $(DEB)/src
	@ls $(DEB)/*.deb

build/.setup-deb: $(STAMP)
	@missing=$$(for p in $(DEB_PACKAGES); do dpkg-query -W -f '$${Status}\n' $$p 2>/dev/null | \
		grep -q '^install ok installed' || echo $$p; done | tr '\n' ' '); \
	if [ -n "$${missing% }" ]; then \
		if [ "$$(id -u)" != 0 ]; then echo "as root: apt-get install $$missing"; exit 1; fi; \
		apt-get update && apt-get install -y --no-install-recommends $$missing; \
	fi
	@touch $@

# by their hashes, so a mirror cannot give something else
$(DEB)/vendored/.complete: deploy/debian/vendored.txt | $(STAMP)
	rm -rf $(@D)
	$(PY) -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes \
		--only-binary=:all: --dest $(@D) --requirement $<
	@touch $@

# Install the command in an environment of its own, the unit, man pages and documents (as root)
# DESTDIR: another root directory, with the same Python. PREFIX: /usr or /usr/local. The
# environment must not be below /root or /home, which the unit cannot see.
install:
	[ -x $(DESTDIR)$(INSTALLED)/bin/python ] || /usr/bin/python3 -m venv $(DESTDIR)$(INSTALLED)
	# Debian's packages (bcc) become visible only after pip has run: DESTDIR may lack what pip finds here.
	sed -i 's/^\(include-system-site-packages\) .*/\1 = false/' $(DESTDIR)$(INSTALLED)/pyvenv.cfg
	$(DESTDIR)$(INSTALLED)/bin/python -m pip install --quiet --disable-pip-version-check .
	sed -i 's/^\(include-system-site-packages\) .*/\1 = true/' $(DESTDIR)$(INSTALLED)/pyvenv.cfg
	find $(DESTDIR)$(INSTALLED)/bin -type f ! -name 'python*' -exec \
		sed -i 's|$(DESTDIR)$(INSTALLED)|$(INSTALLED)|g' {} +
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/lib/systemd/system
	ln -sfn $(INSTALLED)/bin/colo-xdp $(DESTDIR)$(PREFIX)/bin/colo-xdp
	for unit in 'colo-xdp@.service' 'colo-xdp-handover@.service'; do \
		sed 's|/usr/bin/|$(PREFIX)/bin/|; s|/usr/share/|$(PREFIX)/share/|' "deploy/systemd/$$unit" \
			> "$(DESTDIR)$(PREFIX)/lib/systemd/system/$$unit" || exit 1; \
	done
	install -d $(DESTDIR)$(PREFIX)/share/doc/colo-xdp
	cp -r README.md ARCHITECTURE.md CHANGELOG.md CONTRIBUTING.md LICENSE docs \
		$(filter-out deploy/debian,$(wildcard deploy/*)) $(DESTDIR)$(PREFIX)/share/doc/colo-xdp/
	sed -i 's|/usr/share/|$(PREFIX)/share/|' $(DESTDIR)$(PREFIX)/share/doc/colo-xdp/prometheus/alerts.yml
	$(DESTDIR)$(INSTALLED)/bin/python -B -m tests.docs.man $(DESTDIR)$(PREFIX)/share/man
	install -d -m 0755 $(DESTDIR)/etc/colo-xdp
	[ -n '$(DESTDIR)' ] || [ ! -d /run/systemd/system ] || systemctl daemon-reload

# Remove what `make install` has installed
uninstall:
	rm -rf $(DESTDIR)$(INSTALLED) $(DESTDIR)$(PREFIX)/share/doc/colo-xdp
	rm -f $(DESTDIR)$(PREFIX)/bin/colo-xdp $(DESTDIR)$(PREFIX)/lib/systemd/system/colo-xdp@.service \
		$(DESTDIR)$(PREFIX)/lib/systemd/system/colo-xdp-handover@.service \
		$(DESTDIR)$(PREFIX)/share/man/man8/colo-xdp.8 $(DESTDIR)$(PREFIX)/share/man/man5/colo-xdp.toml.5
	[ -n '$(DESTDIR)' ] || [ ! -d /run/systemd/system ] || systemctl daemon-reload

# Protect a Debian guest on this machine, kill one QEMU after the other, show what lives
demo: setup
	.venv/bin/colo-xdp demo

# Lint what changes fastest, and run the tests of the pure packages: seconds, no root
check: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pytest -q $(CHECK_TESTS)

# Run all tests, or only TESTS (as root)
test: setup $(PROMTOOL)
ifeq ($(TESTS),)
	@nice -n 10 $(PY) -m pytest tests $(addprefix --ignore=,$(KERNEL_TESTS) tests/page tests/tunnel) \
		> build/test-pure.log 2>&1 & pure=$$!; \
	$(PY) -m pytest $(KERNEL_TESTS); kernel=$$?; \
	wait $$pure; pure=$$?; cat build/test-pure.log; \
	[ $$kernel = 0 ] && [ $$pure = 0 ]
else
	$(PY) -m pytest $(TESTS)
endif

# Test with the oldest libraries that pyproject.toml allows
# (unit tests, data path, a fuzz target, a plot, lint)
test-lower-bounds: setup
	$(PY) -m tests.lower_bounds

# Run the end-to-end tests, or only TESTS, on the QEMU of Debian sid (as root)
# (11 or newer, fetched into build/qemu-sid; `make test` runs a small part of them on it)
test-qemu-11: setup
	qemu=$$($(PY) -m colo_xdp.lab.newer_qemu build/qemu-sid) && \
		COLO_QEMU=$$qemu $(PY) -m pytest $(or $(TESTS),tests/e2e)

# Test the package in a root of Debian 13 (`make test`: in one of Debian 12)
test-deb-13: setup build/.setup-deb
	COLO_SUITE=trixie $(PY) -m pytest tests/hosts/test_package.py

# Test the status page in a headless Chromium, which it installs (as root the first time)
# PUBLISH=1: also write the pictures in docs/images
test-page: setup build/.setup-page
	$(if $(PUBLISH),PUBLISH=1) $(PY) -m pytest tests/page

build/.setup-page: | $(STAMP)
	@command -v chromium > /dev/null || { apt-get update && \
		apt-get install -y --no-install-recommends chromium; }
	@touch $@

# Test a pair whose peer link is in a tunnel: WireGuard and ESP, in user space (as root)
# It unpacks Debian's packages in build/tunnel and installs none of them.
test-tunnel: setup build/tunnel/.complete
	$(PY) -m pytest tests/tunnel

build/tunnel/.complete: | $(STAMP)
	@rm -rf $(@D) && mkdir -p $(@D)
	@apt-get update -q > /dev/null
	@cd $(@D) && apt-get download -q $(TUNNEL_PACKAGES) 2> /dev/null && \
		for deb in *.deb; do dpkg-deb -x $$deb . || exit 1; done && rm -f *.deb
	@touch $@

# Run N schedules of the simulator from SEED on; a failing one is minimized and printed
torture: setup
	$(PY) -m tests.sim.torture --runs $(or $(N),100000) --seed $(or $(SEED),0)

# Run a real pair for ROUNDS: in each, something dies, hangs or is cut, and is repaired; SEED, TIME (s)
chaos: setup
	$(PY) -m tests.e2e.chaos --rounds $(or $(ROUNDS),20) --seed $(or $(SEED),0) \
		--seconds $(or $(TIME),1e9)

# Record the metrics of real pairs during incidents, or only during NAMES, for the tests of the alerts (as root)
incidents: setup
	$(PY) -m tests.deploy.record $(NAMES)

# Run two guests on all CPUs against the fast path, with checkpoints, for about STRESS times 7 seconds
stress: setup
	STRESS=$(or $(STRESS),30) $(PY) -m pytest tests/netns/test_offload.py

# Run the coverage-guided fuzzer on one TARGET (default: each for a minute); see tests/fuzz/targets.py
fuzz: setup
	@for t in $(or $(TARGET),packet engine peer qmp config capture); do \
		$(PY) -m tests.fuzz.run $$t -max_total_time=$(or $(TIME),60) || exit 1; \
	done

# Measure against the lower bound and against QEMU's proxy
# Writes build/bench-report.{json,md} and build/bench-*.png. QUICK=1: few runs, without real
# applications; PARTS="held peer": only these parts; APPS_LIVES: runs of real applications in each arm
# (5); APPS_ONLY="tpcb-4 http": these workloads only; PUBLISH=1: also update these parts in
# docs/benchmarks.md and tests/bench/report. README's few figures are updated by hand
# (tests/unit/test_docs.py compares them).
bench: setup build/.setup-bench
	$(PY) -m tests.bench $(if $(QUICK),--quick) $(if $(PUBLISH),--publish) $(PARTS)

build/.setup-bench: $(STAMP)
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[bench]'
	@touch $@

# Write the tables of docs/reference from the code
docs: setup
	$(PY) -m tests.docs.generate

# Show the packages from the highest to the lowest, and what each imports
layers: setup
	@$(PY) -m tests.unit.test_layers

# Check style and types: ruff, mypy (strict), clang-format
lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	clang-format-14 --dry-run -Werror bpf/*.c bpf/*/*.h

# Let ruff and clang-format change the files
format: setup
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	clang-format-14 -i bpf/*.c bpf/*/*.h

# Have git run the pre-commit checks (.pre-commit-config.yaml) at each commit
hooks: setup
	$(PY) -m pip install --quiet --disable-pip-version-check pre-commit
	$(PY) -m pre_commit install

# Remove what was built
clean:
	rm -rf build .venv *.egg-info

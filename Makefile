# The targets are: build, small, test, test-small, check, demo, bench, install, install-postfix.

PREFIX = /usr/local
DESTDIR =
POSTCONF = postconf
CARGO_TARGET_DIR ?= target

RELEASE = $(CARGO_TARGET_DIR)/release/smtp-dup
SMALL = $(CARGO_TARGET_DIR)/smtp-dup-small

build:
	cargo build --release

# For small systems: optimised for size, stripped, and static where rustup has the musl target.
small:
	@set -eu; \
	host=$$(rustc -vV | sed -n 's/^host: //p'); \
	target=$$(echo "$$host" | sed 's/-gnu/-musl/'); \
	linked=static; \
	if [ ! -d "$$(rustc --print target-libdir --target "$$target" 2>/dev/null)" ]; then \
	    target=$$host linked=dynamic; \
	fi; \
	cargo build --profile small --no-default-features --bin smtp-dup --target "$$target"; \
	install -m 755 "$(CARGO_TARGET_DIR)/$$target/small/smtp-dup" "$(SMALL)"; \
	echo "$(SMALL): $$(wc -c <"$(SMALL)") octets, $$linked"

# Most tests wait for peers most of the time: more threads than cores.
test:
	RUST_TEST_THREADS=6 cargo test --no-fail-fast

# The socket tests once more, on the small binary.
test-small: small
	DUP_BINARY="$$(realpath "$(SMALL)")" RUST_TEST_THREADS=6 cargo test --test socket

# All that has to be right before a commit.
check:
	cargo fmt --check
	cargo clippy --all-targets -- -D warnings
	$(MAKE) test
	$(MAKE) test-small
	if command -v mandoc >/dev/null; then mandoc -T lint -W warning man/*.[58]; fi

# One message through smtp-dup to three servers; KEEP=1 leaves them up for your own mail.
demo:
	cargo build --bin smtp-dup --example sink --example send
	@KEEP=$(KEEP) etc/demo.sh "$(CARGO_TARGET_DIR)/debug"

bench:
	cargo bench
	benches/end-to-end

# Builds only what is missing, so that root, who installs, needs no cargo after `make build`.
# Never touches a config.yaml that is there: only the sample is replaced. Starts nothing.
EXAMPLES = $(DESTDIR)$(PREFIX)/share/doc/smtp-dup
UNITS = $(DESTDIR)$(PREFIX)/lib/systemd/system

install: $(RELEASE)
	install -d "$(DESTDIR)$(PREFIX)/bin" "$(DESTDIR)$(PREFIX)/share/man/man5" \
	    "$(DESTDIR)$(PREFIX)/share/man/man8" "$(DESTDIR)/etc/smtp-dup" "$(UNITS)" \
	    "$(DESTDIR)$(PREFIX)/lib/sysusers.d" "$(EXAMPLES)/postfix" "$(EXAMPLES)/systemd"
	install -m 755 "$(RELEASE)" "$(DESTDIR)$(PREFIX)/bin/smtp-dup"
	install -m 644 man/smtp-dup.8 "$(DESTDIR)$(PREFIX)/share/man/man8/smtp-dup.8"
	install -m 644 man/smtp-dup.yaml.5 "$(DESTDIR)$(PREFIX)/share/man/man5/smtp-dup.yaml.5"
	install -m 644 etc/config.yaml "$(DESTDIR)/etc/smtp-dup/config.yaml.sample"
	install -m 644 etc/sysusers.d/smtp-dup.conf "$(DESTDIR)$(PREFIX)/lib/sysusers.d/smtp-dup.conf"
	for unit in smtp-dup.service smtp-dup.socket smtp-dup-inetd.socket smtp-dup-inetd@.service; do \
	    sed 's,/usr/local/bin/,$(PREFIX)/bin/,' "etc/systemd/$$unit" >"$(UNITS)/$$unit" && \
	    chmod 644 "$(UNITS)/$$unit" || exit; \
	done
	install -m 644 etc/inetd.conf etc/examples/*.yaml "$(EXAMPLES)"
	install -m 644 etc/postfix/* "$(EXAMPLES)/postfix"
	install -m 644 etc/systemd/*.conf "$(EXAMPLES)/systemd"

# Beside Postfix's own daemons, so that its master can start it.
install-postfix: $(RELEASE)
	daemons=$$($(POSTCONF) -h daemon_directory) && \
	    install -d "$(DESTDIR)$$daemons" && \
	    install -m 755 "$(RELEASE)" "$(DESTDIR)$$daemons/smtp-dup"

$(RELEASE):
	cargo build --release

.PHONY: build small test test-small check demo bench install install-postfix

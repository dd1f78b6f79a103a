# The targets are: build, test, check, demo, bench, install.

PREFIX = /usr/local
DESTDIR =
CARGO_TARGET_DIR ?= target

build:
	cargo build --release

# Most tests wait for peers most of the time: more threads than cores.
test:
	RUST_TEST_THREADS=6 cargo test --no-fail-fast

# All that has to be right before a commit.
check:
	cargo fmt --check
	cargo clippy --all-targets -- -D warnings
	$(MAKE) test
	if command -v mandoc >/dev/null; then mandoc -T lint -W warning man/*.[58]; fi

# One message through smtp-dup to three servers; KEEP=1 leaves them up for your own mail.
demo:
	cargo build --bin smtp-dup --example sink --example send
	@KEEP=$(KEEP) etc/demo.sh "$(CARGO_TARGET_DIR)/debug"

bench:
	cargo bench
	benches/end-to-end

# Builds only what is missing, so that root, who installs, needs no cargo after `make build`.
# Never touches a config.yaml that is there: only the sample is replaced.
install: $(CARGO_TARGET_DIR)/release/smtp-dup
	install -d "$(DESTDIR)$(PREFIX)/bin" "$(DESTDIR)$(PREFIX)/share/man/man5" \
	    "$(DESTDIR)$(PREFIX)/share/man/man8" "$(DESTDIR)/etc/smtp-dup"
	install -m 755 "$(CARGO_TARGET_DIR)/release/smtp-dup" "$(DESTDIR)$(PREFIX)/bin/smtp-dup"
	install -m 644 man/smtp-dup.8 "$(DESTDIR)$(PREFIX)/share/man/man8/smtp-dup.8"
	install -m 644 man/smtp-dup.yaml.5 "$(DESTDIR)$(PREFIX)/share/man/man5/smtp-dup.yaml.5"
	install -m 644 etc/config.yaml "$(DESTDIR)/etc/smtp-dup/config.yaml.sample"

$(CARGO_TARGET_DIR)/release/smtp-dup:
	cargo build --release

.PHONY: build test check demo bench install

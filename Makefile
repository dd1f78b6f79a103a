# The targets are: build, small, test, test-small, soak, load, fuzz, check, demo, bench, install,
# install-postfix.

PREFIX = /usr/local
DESTDIR =
POSTCONF = postconf
CARGO_TARGET_DIR ?= target

RELEASE = $(CARGO_TARGET_DIR)/release/smtp-dup
SMALL = $(CARGO_TARGET_DIR)/smtp-dup-small

build:
	cargo build --release

# For small systems: optimised for size, stripped, and static where rustup has the musl target.
# Without TLS, or with it: make small FEATURES=tls. C compilers of their own few systems have for
# musl; what there is in C needs no libc, nor the checks that distributions add from theirs.
FEATURES =

small:
	@set -eu; \
	host=$$(rustc -vV | sed -n 's/^host: //p'); \
	target=$$(echo "$$host" | sed 's/-gnu/-musl/'); \
	linked=static; \
	if [ ! -d "$$(rustc --print target-libdir --target "$$target" 2>/dev/null)" ]; then \
	    target=$$host linked=dynamic; \
	fi; \
	for_it=$$(echo "$$target" | tr - _); \
	env "CC_$$for_it=$(CC)" "CFLAGS_$$for_it=-U_FORTIFY_SOURCE" \
	    cargo build --profile small --no-default-features --features "$(FEATURES)" \
	    --bin smtp-dup --target "$$target"; \
	install -m 755 "$(CARGO_TARGET_DIR)/$$target/small/smtp-dup" "$(SMALL)"; \
	echo "$(SMALL): $$(wc -c <"$(SMALL)") octets, $$linked"

# Most tests wait for peers most of the time: more threads than cores.
test:
	RUST_TEST_THREADS=6 cargo test --no-fail-fast

# The socket tests once more, on the small binary; and those of TLS, on the one that has it.
test-small:
	$(MAKE) small FEATURES=tls
	DUP_BINARY="$$(realpath "$(SMALL)")" RUST_TEST_THREADS=6 cargo test --test tls
	$(MAKE) small
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

# Ten minutes of mixed faults for the spool, with a ledger that must balance.
soak: build
	tests/soak "$(RELEASE)"

# What hostile clients can do, with thousands of connections and a million commands; two minutes,
# and about 16000 descriptors (ulimit -n).
load: build
	LOAD=full DUP_BINARY="$$(realpath "$(RELEASE)")" \
	    cargo test --test socket -- --nocapture --test-threads 1 load:: shortage::few

# Each fuzz target for so many seconds. What they keep from run to run is in $(FUZZ)/corpus; what
# breaks one is in tests/fuzz/artifacts, and belongs into tests/fuzz/corpus, which `make test` runs.
# Without a sanitizer, which takes a nightly compiler: coverage and libFuzzer do not, and what is
# looked for here are panics and broken promises, not the memory errors of unsafe code.
# The seed is random unless one is given.
SECONDS = 60
SEED = 0
FUZZ = $(CARGO_TARGET_DIR)/fuzz

fuzz:
	@set -eu; \
	PATH="$$(realpath -m "$(FUZZ)")/bin:$$PATH"; \
	command -v cargo-fuzz >/dev/null || \
	    cargo install cargo-fuzz@0.13.2 --locked --debug --quiet --root "$(FUZZ)"; \
	cargo fuzz build --fuzz-dir tests/fuzz --target-dir "$(FUZZ)" -s none; \
	for target in session server yaml spool; do \
	    mkdir -p "$(FUZZ)/corpus/$$target"; \
	    cargo fuzz run --fuzz-dir tests/fuzz --target-dir "$(FUZZ)" -s none $$target \
	        "$(FUZZ)/corpus/$$target" tests/fuzz/corpus/$$target -- \
	        -max_total_time=$(SECONDS) -seed=$(SEED) -timeout=60 -rss_limit_mb=1024 -verbosity=0 -print_final_stats=1; \
	done

bench:
	cargo bench
	benches/end-to-end

# Builds only what is missing, so that root, who installs, needs no cargo after `make build`.
# Never touches a config.yaml that is there: only the sample is replaced. Starts nothing.
DOC = $(DESTDIR)$(PREFIX)/share/doc/smtp-dup
LIB = $(DESTDIR)$(PREFIX)/lib
MAN = $(DESTDIR)$(PREFIX)/share/man

# Texts name files below /usr/local, and those that are installed the PREFIX.
PLACE = sed -e 's,/usr/local/bin/smtp-dup,$(PREFIX)/bin/smtp-dup,g' \
    -e 's,/usr/local/lib/,$(PREFIX)/lib/,g' -e 's,/usr/local/share/,$(PREFIX)/share/,g'

install: $(RELEASE)
	install -d "$(DESTDIR)$(PREFIX)/bin" "$(DESTDIR)/etc/smtp-dup" "$(MAN)/man5" "$(MAN)/man8" \
	    "$(LIB)/systemd/system" "$(LIB)/sysusers.d" "$(LIB)/tmpfiles.d" \
	    "$(DOC)/postfix" "$(DOC)/systemd" "$(DOC)/spool"
	install -m 755 "$(RELEASE)" "$(DESTDIR)$(PREFIX)/bin/smtp-dup"
	install -m 644 etc/config.yaml "$(DESTDIR)/etc/smtp-dup/config.yaml.sample"
	set -e; put() { $(PLACE) "$$1" >"$$2/$${1##*/}"; chmod 644 "$$2/$${1##*/}"; }; \
	put man/smtp-dup.8 "$(MAN)/man8"; \
	for file in man/*.5; do put "$$file" "$(MAN)/man5"; done; \
	put etc/sysusers.d/smtp-dup.conf "$(LIB)/sysusers.d"; \
	put etc/tmpfiles.d/smtp-dup.conf "$(LIB)/tmpfiles.d"; \
	for file in etc/systemd/*.service etc/systemd/*.socket etc/systemd/*.timer; do \
	    put "$$file" "$(LIB)/systemd/system"; \
	done; \
	for file in etc/inetd.conf etc/smtp-dup.cron etc/examples/*.yaml; do put "$$file" "$(DOC)"; done; \
	for file in etc/spool/*; do put "$$file" "$(DOC)/spool"; done; \
	for file in etc/postfix/*; do put "$$file" "$(DOC)/postfix"; done; \
	for file in etc/systemd/*.conf; do put "$$file" "$(DOC)/systemd"; done

# Beside Postfix's own daemons, so that its master can start it.
install-postfix: $(RELEASE)
	daemons=$$($(POSTCONF) -h daemon_directory) && \
	    install -d "$(DESTDIR)$$daemons" && \
	    install -m 755 "$(RELEASE)" "$(DESTDIR)$$daemons/smtp-dup"

$(RELEASE):
	cargo build --release

.PHONY: build small test test-small soak load fuzz check demo bench install install-postfix

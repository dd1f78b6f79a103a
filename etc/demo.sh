#!/bin/sh
# One message through smtp-dup to three servers, and a look at what each of them stored.
# `make demo` builds the programs and calls this with the folder they are in.
#
# With KEEP=1 everything stays up afterwards, until Ctrl-C.
# Exit code 0 only when all three copies are there and identical to what was sent.

set -eu
bin=$1
etc=$(dirname "$0")
unset RUST_LOG SMTP_DUP_LOG_LEVEL # they could silence the log lines that this script waits for
dir=$(mktemp -d "${TMPDIR:-/tmp}/smtp-dup-demo.XXXXXX")
pids=

cleanup() {
    code=$?
    trap '' INT TERM
    trap - EXIT
    for pid in $pids; do
        kill "$pid" 2>/dev/null || :
    done
    wait
    if [ "$code" = 0 ]; then
        rm -rf "$dir"
    else
        echo "the demo FAILED. What it left is in $dir; smtp-dup said:" >&2
        cat "$dir/smtp-dup.log" >&2 || :
    fi
    exit "$code"
}
trap cleanup EXIT
trap 'exit "${stopped:-130}"' INT TERM # 0 once Ctrl-C is the way to end it

# Waits for a command to succeed, ten seconds at most: each wait here takes milliseconds.
await() {
    what=$1
    shift
    tries=0
    until "$@"; do
        tries=$((tries + 1))
        if [ "$tries" -gt 100 ]; then
            echo "waited 10 s in vain for $what" >&2
            exit 1
        fi
        sleep 0.1
    done
}

# 1. Three servers on free ports.
for name in primary backup1 backup2; do
    "$bin/examples/sink" "127.0.0.1:0=$dir/$name" >"$dir/$name.log" 2>&1 &
    pids="$pids $!"
done
address() { sed -n 's/^listening on \([^ ]*\) .*/\1/p' "$dir/$1.log"; }
for name in primary backup1 backup2; do
    await "the sink of $name" grep -qs '^listening' "$dir/$name.log"
    echo "$name is $(address $name), storing in $dir/$name"
done

# 2. smtp-dup in front of them.
SMTP_DUP_RELAY_DESTINATION_PRIMARY=$(address primary)
SMTP_DUP_RELAY_DESTINATION_BACKUPS=$(address backup1),$(address backup2)
export SMTP_DUP_RELAY_DESTINATION_PRIMARY SMTP_DUP_RELAY_DESTINATION_BACKUPS
# A copy: root may run this in somebody else's checkout, whose files smtp-dup would not trust.
cp "$etc/demo.yaml" "$dir/config.yaml"
"$bin/smtp-dup" --config "$dir/config.yaml" 2>"$dir/smtp-dup.log" &
smtp_dup=$!
pids="$smtp_dup $pids"
await "smtp-dup to start" grep -qs ' starting ' "$dir/smtp-dup.log"
listen=$(sed -n 's/.* listen=\([^ ]*\) .*/\1/p' "$dir/smtp-dup.log")
echo "smtp-dup listens on $listen"

# 3. One message: 8-bit text, and lines of dots, which SMTP has to quote.
{
    echo "Date: $(LC_ALL=C date '+%a, %d %b %Y %H:%M:%S %z')"
    cat <<'MESSAGE'
From: Ada <ada@example.com>
To: Grace <grace@example.com>
Subject: one message, three servers
Message-ID: <demo.1@example.com>
MIME-Version: 1.0
Content-Type: text/plain; charset=UTF-8
Content-Transfer-Encoding: 8bit

Grüße an alle drei. The next line is a lone dot, which must not end the message:
.
..and this one begins with two.
MESSAGE
} | awk '{ printf "%s\r\n", $0 }' >"$dir/sent"
echo
echo "A client sends one message to smtp-dup:"
"$bin/examples/send" "$listen" ada@example.com grace@example.com <"$dir/sent"

# 4. Look. The copies follow the reply to the client, so they may take a moment.
stored() { [ "$(ls "$dir/$1/new" | wc -l)" -eq 1 ]; }
for name in primary backup1 backup2; do
    await "the message to reach $name" stored "$name"
done
await "the log line of each copy" \
    sh -c "[ \"\$(grep -c 'role=backup .*status=sent' '$dir/smtp-dup.log')\" -eq 2 ]"
echo
echo "What smtp-dup logged:"
sed 's/^/  /' "$dir/smtp-dup.log"
echo
echo "What the three servers stored:"
for name in primary backup1 backup2; do
    set -- "$dir/$name"/new/*
    cmp "$dir/sent" "$1"
    echo "  $(cksum <"$1" | awk '{ print "cksum " $1 ", " $2 " octets" }')  $1"
done
echo "All three are identical to the message sent, octet for octet."

# 5. Stay, or end.
if [ -n "${KEEP:-}" ] && [ "$KEEP" != 0 ]; then
    stopped=0
    echo
    echo "Send your own mail to $listen; the three servers store it in"
    echo "$dir/{primary,backup1,backup2}/new until Ctrl-C, which removes it. smtp-dup's log:"
    tail -n 0 -f "$dir/smtp-dup.log" &
    pids="$pids $!"
    wait "$smtp_dup"
    exit 1 # nobody asked it to end
fi

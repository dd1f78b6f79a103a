//! Throughput of the end-of-data framing: every octet of every message goes through it once.
//!
//! A message is fed as a session feeds it, in reads of 64 KB into an output buffer that is used
//! again. `ordinary` is the one that counts; `hostile` is made of what the framing has to mend,
//! `long-line` has next to nothing in it to look for.

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use smtp_dup::smtp::wire::{BodyDecoder, Decoded};

const READ: usize = 64 * 1024;
const SIZE: usize = 1024 * 1024;

/// `pattern` again and again up to `SIZE`, and the end of data.
fn message(pattern: &[u8]) -> Vec<u8> {
    let mut message = pattern.repeat(SIZE / pattern.len());
    message.extend_from_slice(b"\r\n.\r\n");
    message
}

/// Decodes one message, calls `sink` with each piece of output, and says how much was consumed.
fn decode(message: &[u8], out: &mut Vec<u8>, mut sink: impl FnMut(&[u8])) -> usize {
    let mut decoder = BodyDecoder::new();
    let mut before = 0;
    for read in message.chunks(READ) {
        out.clear();
        let decoded = decoder.decode(read, out);
        sink(out);
        match decoded {
            Decoded::More => before += read.len(),
            Decoded::End { consumed } => return before + consumed,
        }
    }
    panic!("the decoder did not see the end of the message");
}

fn framing(criterion: &mut Criterion) {
    // 78 octets with their CR LF: the shorter the line, the more there is to look at.
    let ordinary = message(&[&[b'x'; 76][..], b"\r\n"].concat());
    let hostile = message(b"\n.\n..\r\n\r.\r\n.\r\r\nab\n\n.x\r\n...\r\n");
    let long_line = message(b"x");

    let mut group = criterion.benchmark_group("framing");
    group.warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(3));
    let mut out = Vec::with_capacity(4 * READ);
    for (name, message, canonical) in [
        ("ordinary", &ordinary, true),
        ("hostile", &hostile, false),
        ("long-line", &long_line, true),
    ] {
        // Fast and wrong is no figure: the whole message is consumed, and canonical mail is
        // left as it is.
        let mut wire = Vec::new();
        let consumed = decode(message, &mut out, |piece| wire.extend_from_slice(piece));
        assert_eq!(consumed, message.len(), "{name} ended early");
        assert!(!canonical || wire == *message, "{name} was changed");

        group.throughput(Throughput::Bytes(message.len() as u64));
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                decode(black_box(message), &mut out, |piece| {
                    black_box(piece);
                })
            })
        });
    }
    group.finish();
}

criterion_group!(benches, framing);
criterion_main!(benches);

//! Properties of the framing: whatever octets come, in whatever pieces, the canonical form is the
//! same, and is what a slow and simple second implementation makes of them.

#[path = "fuzz/rules.rs"]
#[allow(dead_code)]
mod rules;

use proptest::collection::vec;
use proptest::prelude::*;
use smtp_dup::smtp::foreign::Foreign;
use smtp_dup::smtp::wire::{BodyDecoder, Decoded, Input, Line};

use rules::{by_lines, has_bare};

/// Feeds `input` cut at `cuts`. Gives the canonical form, and how many octets it took when the
/// message ended.
fn decode(input: &[u8], cuts: &[usize]) -> (Vec<u8>, Option<usize>) {
    let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % (input.len() + 1)).collect();
    cuts.extend([0, input.len()]);
    cuts.sort_unstable();
    let (mut decoder, mut out) = (BodyDecoder::new(), Vec::new());
    for piece in cuts.windows(2) {
        if let Decoded::End { consumed } = decoder.decode(&input[piece[0]..piece[1]], &mut out) {
            return (out, Some(piece[0] + consumed));
        }
    }
    (out, None)
}

/// Octets made mostly of those that matter, ended so that they are a whole message.
fn message() -> impl Strategy<Value = Vec<u8>> {
    let word = prop_oneof![
        8 => prop::sample::select(vec!["\r", "\n", ".", "\0", "a", "\r\n", "\r\n."]).prop_map(|w| w.as_bytes().to_vec()),
        1 => vec(any::<u8>(), 0..4),
        1 => Just(b"\r\n.\r\n".to_vec()),
        1 => (0..200usize).prop_map(|n| vec![b'x'; n]),
    ];
    vec(word, 0..24).prop_map(|words| [words.concat(), b"\r\n.\r\n".to_vec()].concat())
}

/// No bare CR or LF, and CR LF . CR LF (or . CR LF at the start) at the end alone, for servers
/// that drop NULs too.
fn is_canonical(wire: &[u8]) -> bool {
    let mut seen = b"\r\n".to_vec();
    seen.extend(wire.iter().filter(|&&o| o != 0));
    let end = seen.windows(5).position(|five| five == b"\r\n.\r\n");
    !has_bare(wire) && end == Some(seen.len() - 5)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_message_is_the_same_however_it_is_cut(input in message(), cuts in vec(any::<usize>(), 0..12)) {
        let whole = decode(&input, &[]);
        prop_assert_eq!(&decode(&input, &cuts), &whole);
        let every_octet: Vec<usize> = (0..input.len()).collect();
        prop_assert_eq!(&decode(&input, &every_octet), &whole);
    }

    #[test]
    fn any_message_leaves_as_the_rules_say(input in message()) {
        prop_assert_eq!(decode(&input, &[]), by_lines(&input));
    }

    #[test]
    fn any_message_leaves_canonical(input in message()) {
        let (out, end) = decode(&input, &[]);
        prop_assert!(end.is_some());
        prop_assert!(is_canonical(&out), "{}", out.escape_ascii());
    }

    #[test]
    fn what_is_canonical_leaves_as_it_came(input in message()) {
        let (once, _) = decode(&input, &[]);
        prop_assert_eq!(decode(&once, &[]), (once.clone(), Some(once.len())));
    }

    #[test]
    fn command_lines_are_the_same_however_they_are_cut(
        lines in vec(prop_oneof![9 => vec(any::<u8>().prop_filter("no LF", |o| *o != b'\n'), 0..40), 9 => vec(b' '..=b'~', 0..40), 1 => Just(vec![b'x'; 3000])], 0..20),
        step in 1..50usize,
    ) {
        let stream: Vec<u8> = lines.iter().flat_map(|line| [line.as_slice(), b"\n"].concat()).collect();
        // Up to the first that is no SMTP, wherever in it that was seen.
        let is_smtp = |line: &&Vec<u8>| Foreign::find(&[line, b"\n".as_slice()].concat()).is_none();
        let expected: Vec<Option<Vec<u8>>> = lines.iter().take_while(is_smtp).map(|line| {
            (line.len() < 2048).then(|| line.strip_suffix(b"\r").unwrap_or(line).to_vec())
        }).collect();
        let (mut input, mut heard) = (Input::new(vec![0; 4096]), Vec::new());
        'stream: for piece in stream.chunks(step) {
            input.room()[..piece.len()].copy_from_slice(piece);
            input.filled(piece.len());
            loop {
                match input.peek_line() {
                    Line::Whole(line) => heard.push(Some(line.to_vec())),
                    Line::TooLong => heard.push(None),
                    Line::Partial => break,
                    Line::Foreign(_) => break 'stream,
                }
                input.consume_line();
            }
        }
        prop_assert_eq!(heard, expected);
    }
}

/// A run of CRs is held back as a number, not as octets, and not for ever.
#[test]
fn endless_crs_take_no_memory() {
    let (mut decoder, mut out) = (BodyDecoder::new(), Vec::new());
    for _ in 0..1000 {
        decoder.decode(&[b'\r'; 1000], &mut out);
        assert!(out.len() <= 2 * 1000 + 2 * 1024, "{}", out.len());
        out.clear();
    }
}

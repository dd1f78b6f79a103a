//! The rules of the wire once more, as slow and simple as can be, to compare smtp-dup with.

/// Longer runs of CRs, or of NULs behind a dot, are not waited for: the CRs are bare, the dot lone.
const MAX_RUN: usize = 1024;

/// How a line ended: exactly CR LF, more CRs and LF, or a bare CR or LF.
#[derive(Clone, Copy, PartialEq)]
enum Ending {
    Exact,
    MoreCrs,
    Bare,
}

/// The framing of a message, line by line over the whole input: the canonical form, and how many
/// octets the message took if it ended.
pub fn by_lines(input: &[u8]) -> (Vec<u8>, Option<usize>) {
    let (mut out, mut at, mut before) = (Vec::new(), 0, Ending::Exact);
    while at < input.len() {
        let length =
            input[at..].iter().position(|o| b"\r\n".contains(o)).unwrap_or(input.len() - at);
        let line = &input[at..at + length];
        let rest = &input[at + length..];
        let crs = rest.iter().take_while(|&&o| o == b'\r').count();
        let (ending, taken, breaks) = match rest.get(crs) {
            _ if crs > MAX_RUN => (Ending::Bare, MAX_RUN, MAX_RUN),
            Some(b'\n') if crs == 0 => (Ending::Bare, 1, 1),
            Some(b'\n') if crs == 1 => (Ending::Exact, 2, 1),
            Some(b'\n') => (Ending::MoreCrs, crs + 1, 1),
            _ => (Ending::Bare, 1, 1),
        };
        at += length + taken;
        let nuls = line.iter().take_while(|&&o| o == 0).count();
        let lone = match &line[nuls..] {
            b"." => nuls > 0 || ending != Ending::Exact,
            [b'.', rest @ ..] => rest.iter().take(MAX_RUN + 1).all(|&o| o == 0),
            _ => false,
        };
        if line == b"." && before != Ending::Bare && ending == Ending::Exact {
            out.extend_from_slice(b".\r\n");
            return (out, Some(at));
        }
        out.extend_from_slice(&line[..nuls]);
        if lone || line.first() == Some(&b'.') && before == Ending::Bare {
            out.push(b'.');
        }
        out.extend_from_slice(&line[nuls..]);
        out.extend(b"\r\n".repeat(breaks));
        before = ending;
    }
    (out, None)
}

/// A CR or LF that is not part of a CR LF.
pub fn has_bare(wire: &[u8]) -> bool {
    let is_bare = |at: usize| match wire[at] {
        b'\r' => wire.get(at + 1) != Some(&b'\n'),
        b'\n' => at == 0 || wire[at - 1] != b'\r',
        _ => false,
    };
    (0..wire.len()).any(is_bare)
}

/// Splits what a client heard into replies, each with its lines. Every one has to be what RFC 5321
/// §4.2 allows: one code of 200 to 599, "-" behind it in all lines but the last, no control octets,
/// CR LF.
pub fn replies(heard: &[u8]) -> Vec<(u16, &[u8])> {
    let shown = || heard.escape_ascii();
    assert!(!has_bare(heard), "a bare CR or LF: {}", shown());
    let (mut all, mut start, mut end) = (Vec::new(), 0, 0);
    for line in heard.split_inclusive(|&octet| octet == b'\n') {
        let text = line.strip_suffix(b"\r\n").unwrap_or_else(|| panic!("half a line: {}", shown()));
        let is_code = matches!(text, [b'2'..=b'5', b'0'..=b'9', b'0'..=b'9', b' ' | b'-', ..]);
        assert!(is_code, "no code: {}", shown());
        assert_eq!(text[..3], heard[start..start + 3], "two codes: {}", shown());
        let is_control = |&octet: &u8| octet != b'\t' && octet.is_ascii_control();
        assert!(!text.iter().any(is_control), "a control octet: {}", shown());
        end += line.len();
        if text[3] == b' ' {
            let code = text[..3].iter().fold(0, |code, digit| code * 10 + u16::from(digit - b'0'));
            all.push((code, &heard[start..end]));
            start = end;
        }
    }
    assert_eq!(start, heard.len(), "half a reply: {}", shown());
    all
}

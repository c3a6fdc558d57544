//! WebSocket frames (RFC 6455) as the load client needs them: whole messages, one frame each.
//!
//! The mask is zero: it fulfils the protocol, leaves the payload as it is, and costs the client nothing.

pub(crate) const CONTINUATION: u8 = 0;
pub(crate) const TEXT: u8 = 1;
pub(crate) const BINARY: u8 = 2;
pub(crate) const CLOSE: u8 = 8;
pub(crate) const PING: u8 = 9;
pub(crate) const PONG: u8 = 10;

pub(crate) const FIN: u8 = 0x80;
const MASKED: u8 = 0x80;
const TWO_BYTES: u8 = 126;
const EIGHT_BYTES: u8 = 127;

/// A frame of the server, still in the buffer it was read into.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Frame<'a> {
    pub(crate) opcode: u8,
    pub(crate) payload: &'a [u8],
}

/// Appends a client's frame to `out`.
pub(crate) fn encode(opcode: u8, payload: &[u8], out: &mut Vec<u8>) {
    out.push(FIN | opcode);
    let length = payload.len();
    match (u16::try_from(length), u8::try_from(length)) {
        (_, Ok(short)) if short < TWO_BYTES => out.push(MASKED | short),
        (Ok(medium), _) => {
            out.push(MASKED | TWO_BYTES);
            out.extend_from_slice(&medium.to_be_bytes());
        }
        _ => {
            out.push(MASKED | EIGHT_BYTES);
            out.extend_from_slice(&(length as u64).to_be_bytes());
        }
    }
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(payload);
}

/// A server's frame: the client's without the mask.
pub(crate) fn of_server(opcode: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode(opcode, payload, &mut bytes);
    bytes[1] &= !MASKED;
    let mask = bytes.len() - payload.len() - 4;
    bytes.drain(mask..mask + 4);
    bytes
}

/// The first frame in `bytes` and its length with the header; `None` while it is not whole.
pub(crate) fn decode(bytes: &[u8]) -> Option<(Frame<'_>, usize)> {
    let (&[first, second], rest) = bytes.split_first_chunk::<2>()?;
    let (length, rest) = match second & !MASKED {
        TWO_BYTES => {
            let (length, rest) = rest.split_first_chunk()?;
            (usize::from(u16::from_be_bytes(*length)), rest)
        }
        EIGHT_BYTES => {
            let (length, rest) = rest.split_first_chunk()?;
            (usize::try_from(u64::from_be_bytes(*length)).ok()?, rest)
        }
        short => (usize::from(short), rest),
    };
    let payload = rest.get(..length)?;
    let header = bytes.len() - rest.len();
    Some((Frame { opcode: first & 0x0f, payload }, header + length))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_text_is_two_bytes_a_zero_mask_and_itself() {
        let mut out = b"before".to_vec();
        encode(TEXT, b"hi", &mut out);
        assert_eq!(out, b"before\x81\x82\0\0\0\0hi");
    }

    #[test]
    fn what_is_encoded_decodes_at_every_size_of_the_length() {
        for length in [0, 1, 125, 126, 127, 255, 256, 65_535, 65_536] {
            let payload = vec![b'x'; length];
            let mut bytes = of_server(TEXT, &payload);
            let whole = bytes.len();
            bytes.extend_from_slice(b"the next");
            let decoded = decode(&bytes);
            assert_eq!(decoded, Some((Frame { opcode: TEXT, payload: &payload }, whole)));
        }
    }

    #[test]
    fn a_part_of_a_frame_is_not_a_frame() {
        for length in [2, 200, 70_000] {
            let bytes = of_server(PING, &vec![b'x'; length]);
            for part in [0, 1, 2, 3, 9, bytes.len() - 1] {
                assert_eq!(decode(&bytes[..part.min(bytes.len() - 1)]), None, "{part} of {length}");
            }
        }
    }
}

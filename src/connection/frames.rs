//! Follows the frames in the bytes of a client, ahead of tungstenite, for three things that tungstenite does
//! not do: it hides fragments, it has one size limit for a connection's whole life, and it does not tell of a
//! message that has arrived in part.

use crate::protocol::CloseReason;

/// Bytes of payload under which a fragment costs more than what it carries. The last of a message is free.
const SMALL: u64 = 64;
/// Bytes of the first message: a token of 16 KiB, and what is around it.
const FIRST_MESSAGE: u16 = 20 * 1024;
/// Control frames and small fragments before the end of the first message.
const FIRST_FRAMES: u8 = 10;
/// Bytes of the longest header, without its mask.
const HEADER: usize = 10;

/// A rule of ours that a client broke, and the reason to close with.
#[derive(Debug, thiserror::Error, Clone, Copy, PartialEq, Eq)]
#[error("{}", .0.text())]
pub(crate) struct Breach(pub(crate) CloseReason);

/// Where the bytes that were read end among the frames.
#[derive(Default)]
pub(super) struct Frames {
    /// Bytes of mask and payload still to come.
    skip: u64,
    small_fragments: u32,
    /// The header that is being read, and how much of it was read.
    header: [u8; HEADER],
    have: u8,
    /// The last fragment of a message is still to begin.
    open: bool,
    /// A message has begun since [`Frames::arriving`] was asked.
    begun: bool,
    first: Option<First>,
}

/// What may still arrive before the first message is whole.
struct First {
    bytes: u16,
    frames: u8,
}

impl Frames {
    /// Bounds what arrives up to the end of the first message.
    pub(super) fn bound_first_message(&mut self) {
        self.first = Some(First { bytes: FIRST_MESSAGE, frames: FIRST_FRAMES });
    }

    /// Whether there is one to take.
    #[inline]
    pub(super) fn has_small_fragments(&self) -> bool {
        self.small_fragments > 0
    }

    /// The fragments since the last call that carried almost nothing.
    pub(super) fn take_small_fragments(&mut self) -> u32 {
        std::mem::take(&mut self.small_fragments)
    }

    /// Whether a message has arrived in part, and if so whether it has begun since the last call. A control
    /// frame counts as one, unless it comes between the fragments of a message.
    #[inline]
    pub(super) fn arriving(&mut self) -> Option<bool> {
        let begun = std::mem::take(&mut self.begun);
        (self.open || self.skip > 0 || self.have > 0).then_some(begun)
    }

    /// Follows the frames through the next bytes.
    #[inline]
    pub(super) fn follow(&mut self, mut bytes: &[u8]) -> Result<(), Breach> {
        while let Some(rest) = self.skipped(bytes) {
            self.begun |= self.have == 0 && !self.open;
            bytes = match rest.first_chunk() {
                // Nearly all are whole, and need not be copied.
                Some(header) if self.have == 0 => {
                    self.begin(header)?;
                    &rest[header_length(header)..]
                }
                _ => self.gather(rest)?,
            };
        }
        Ok(())
    }

    /// What is left of the bytes behind the frame that is under way, if anything.
    fn skipped<'a>(&mut self, bytes: &'a [u8]) -> Option<&'a [u8]> {
        match usize::try_from(self.skip) {
            Ok(skip) if skip < bytes.len() => {
                self.skip = 0;
                Some(&bytes[skip..])
            }
            _ => {
                self.skip -= bytes.len() as u64;
                None
            }
        }
    }

    /// Adds to a header that does not arrive whole; the bytes that are not its own are left.
    #[cold]
    fn gather<'a>(&mut self, bytes: &'a [u8]) -> Result<&'a [u8], Breach> {
        for (n, byte) in bytes.iter().enumerate() {
            self.header[usize::from(self.have)] = *byte;
            self.have += 1;
            if self.have >= 2 && usize::from(self.have) == header_length(&self.header) {
                self.have = 0;
                let header = self.header;
                self.begin(&header)?;
                return Ok(&bytes[n + 1..]);
            }
        }
        Ok(&[])
    }

    /// Counts a frame whose header has arrived.
    fn begin(&mut self, header: &[u8; HEADER]) -> Result<(), Breach> {
        let [kind, short, long @ ..] = *header;
        let payload = match short & 0x7f {
            126 => u16::from_be_bytes([long[0], long[1]]).into(),
            127 => u64::from_be_bytes(long),
            short => short.into(),
        };
        let mask = if short & 0x80 == 0 { 0 } else { 4 };
        self.skip = payload.saturating_add(mask);
        let (last, control) = (kind & 0x80 != 0, kind & 0x08 != 0);
        if !control {
            self.open = !last;
        }
        let small = payload < SMALL && !last && !control;
        if small {
            self.small_fragments = self.small_fragments.saturating_add(1);
        }
        match &mut self.first {
            Some(first) => {
                first.take(payload, small || control, control)?;
                if last && !control {
                    self.first = None;
                }
                Ok(())
            }
            None => Ok(()),
        }
    }
}

impl First {
    #[cold]
    fn take(&mut self, payload: u64, counted: bool, control: bool) -> Result<(), Breach> {
        if counted {
            let left = self.frames.checked_sub(1);
            self.frames = left.ok_or(Breach(CloseReason::TooManyStrikes))?;
        }
        if !control {
            let left = u16::try_from(payload).ok().and_then(|size| self.bytes.checked_sub(size));
            self.bytes = left.ok_or(Breach(CloseReason::TooBig))?;
        }
        Ok(())
    }
}

/// As its first two bytes tell, without the mask.
fn header_length(header: &[u8; HEADER]) -> usize {
    match header[1] & 0x7f {
        126 => 4,
        127 => HEADER,
        _ => 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A masked frame of so many bytes.
    fn frame(kind: u8, payload: usize) -> Vec<u8> {
        let mut bytes = vec![kind];
        match payload {
            0..126 => bytes.push(0x80 | payload as u8),
            126..65_536 => {
                bytes.push(0x80 | 126);
                bytes.extend((payload as u16).to_be_bytes());
            }
            _ => {
                bytes.push(0x80 | 127);
                bytes.extend((payload as u64).to_be_bytes());
            }
        }
        // Bytes that would be headers of empty fragments.
        bytes.extend(vec![0; 4 + payload]);
        bytes
    }

    fn small_fragments(frames: &[Vec<u8>], piece: usize) -> u32 {
        let mut follower = Frames::default();
        for bytes in frames.concat().chunks(piece) {
            follower.follow(bytes).unwrap();
        }
        assert_eq!((follower.skip, follower.have), (0, 0));
        follower.take_small_fragments()
    }

    #[test]
    fn small_fragments_are_counted_wherever_the_reads_end() {
        let frames = [
            frame(0x81, 0),
            frame(0x01, 0),
            frame(0x00, 63),
            frame(0x89, 125),
            frame(0x00, 64),
            frame(0x00, 70_000),
            frame(0x00, 1),
            frame(0x80, 0),
            frame(0x82, 300),
            frame(0x8a, 0),
            frame(0x02, 5),
            frame(0x80, 10),
        ];
        for piece in [1, 2, 3, 7, 1536, 1_000_000] {
            assert_eq!(small_fragments(&frames, piece), 4, "{piece}");
        }
    }

    #[test]
    fn a_message_is_arriving_from_its_first_byte_to_its_last_and_begins_once() {
        let mut follower = Frames::default();
        let mut arriving = |bytes: &[u8]| {
            follower.follow(bytes).unwrap();
            follower.arriving()
        };
        assert_eq!(arriving(&[]), None);
        let text = frame(0x81, 300);
        assert_eq!(arriving(&text[..1]), Some(true));
        assert_eq!(arriving(&text[1..5]), Some(false));
        assert_eq!(arriving(&text[5..307]), Some(false));
        assert_eq!(arriving(&text[307..]), None);
        // A ping between fragments is not the begin of another message, and a ping alone is one.
        let ping = frame(0x89, 3);
        assert_eq!(arriving(&frame(0x01, 70)), Some(true));
        for part in [&ping[..], &ping[..4], &ping[4..], &frame(0x00, 70), &frame(0x80, 5)[..7]] {
            assert_eq!(arriving(part), Some(false));
        }
        assert_eq!(arriving(&[0; 4]), None);
        assert_eq!(arriving(&ping[..1]), Some(true));
        // The rest of one message, and the begin of the next.
        assert_eq!(arriving(&[&ping[1..], &text[..9]].concat()), Some(true));
        assert_eq!(arriving(&[&text[9..], &text, &text].concat()), None);
    }

    fn first(frames: &[Vec<u8>]) -> Result<(), Breach> {
        let mut follower = Frames::default();
        follower.bound_first_message();
        follower.follow(&frames.concat())
    }

    #[test]
    fn the_first_message_is_bounded_and_no_other() {
        let limit = usize::from(FIRST_MESSAGE);
        let too_big = Err(Breach(CloseReason::TooBig));
        assert_eq!(first(&[frame(0x81, limit), frame(0x81, limit + 1)]), Ok(()));
        assert_eq!(first(&[frame(0x81, limit + 1)[..4].to_vec()]), too_big);
        assert_eq!(first(&[frame(0x81, 65_536)[..10].to_vec()]), too_big);
        assert_eq!(first(&[frame(0x01, limit), frame(0x80, 0), frame(0x82, 65_536)]), Ok(()));
        assert_eq!(first(&[frame(0x01, limit), frame(0x00, 64)]), too_big);
    }

    #[test]
    fn control_frames_before_the_first_message_are_bounded() {
        let too_many = Err(Breach(CloseReason::TooManyStrikes));
        let pings = vec![frame(0x89, 3); 10];
        assert_eq!(first(&[pings.concat(), frame(0x81, 9), pings.concat()]), Ok(()));
        assert_eq!(first(&[pings.concat(), frame(0x8a, 0)]), too_many);
        assert_eq!(first(&[frame(0x01, 0), pings[1..].concat(), frame(0x00, 0)]), too_many);
    }

    #[test]
    fn a_length_that_no_machine_has_is_skipped_and_not_added_up() {
        let mut follower = Frames::default();
        follower.follow(&[&[0x81, 0xff][..], &[0xff; 8]].concat()).unwrap();
        follower.follow(&[0; 100]).unwrap();
        assert_eq!(follower.skip, u64::MAX - 100);
    }
}

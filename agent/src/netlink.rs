//! Netlink's framing (netlink(7)).

/// Messages and attributes begin at multiples of this, in bytes (`NLMSG_ALIGNTO`, `NLA_ALIGNTO`).
const ALIGNMENT: usize = 4;

/// Size of a message's header, in bytes: length, type, flags, sequence number, port.
const HEADER: usize = 16;

/// Messages, each with its attributes, that are sent as one.
#[derive(Default)]
pub struct Request {
    bytes: Vec<u8>,
    /// Where the last message begins.
    last: usize,
    /// What each message is called; its sequence number is the index here.
    names: Vec<&'static str>,
}

impl Request {
    /// Begins a message of this type, with a header of the type's own.
    pub fn message(&mut self, what: &'static str, kind: u16, header: &[u8]) {
        let request = libc::NLM_F_REQUEST | libc::NLM_F_ACK;
        let flags = (request | libc::NLM_F_CREATE | libc::NLM_F_REPLACE) as u16;
        self.close();
        self.last = self.bytes.len();
        // The length is filled in when it is known.
        self.bytes.extend([0; 4]);
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend(flags.to_ne_bytes());
        self.bytes.extend((self.names.len() as u32).to_ne_bytes());
        // From whoever the socket is.
        self.bytes.extend([0; 4]);
        self.bytes.extend(header);
        self.align();
        self.names.push(what);
    }

    /// Adds an attribute to the last message.
    pub fn attribute(&mut self, kind: u16, value: &[u8]) {
        let length = (2 * size_of::<u16>() + value.len()) as u16;
        self.bytes.extend(length.to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend(value);
        self.align();
    }

    /// All bytes, and what each message is called.
    pub fn finish(mut self) -> (Vec<u8>, Vec<&'static str>) {
        self.close();
        (self.bytes, self.names)
    }

    fn close(&mut self) {
        let length = (self.bytes.len() - self.last) as u32;
        if let Some(field) = self.bytes.get_mut(self.last..self.last + 4) {
            field.copy_from_slice(&length.to_ne_bytes());
        }
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGNMENT), 0);
    }
}

/// Sequence number and result, 0 or a negative errno, of each acknowledgement in a datagram.
pub fn acknowledgements(mut bytes: &[u8]) -> Vec<(u32, i32)> {
    let mut found = Vec::new();
    while let Some((header, _)) = bytes.split_at_checked(HEADER) {
        let word = |at: usize| bytes.get(at..)?.first_chunk().copied().map(u32::from_ne_bytes);
        let kind = u16::from_ne_bytes([header[4], header[5]]);
        if let (true, Some(number), Some(code)) =
            (i32::from(kind) == libc::NLMSG_ERROR, word(8), word(HEADER))
        {
            found.push((number, code as i32));
        }
        let length = word(0).unwrap_or_default() as usize;
        bytes = bytes.get(length.next_multiple_of(ALIGNMENT).max(HEADER)..).unwrap_or_default();
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_framed() {
        let mut request = Request::default();
        request.message("first", 16, &[1, 2, 3, 4]);
        request.attribute(1, &[9, 9, 9, 9, 9, 9]);
        request.message("second", 20, &[5]);
        let (bytes, names) = request.finish();
        assert_eq!(names, ["first", "second"]);
        let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
        let half = |at: usize| u16::from_ne_bytes(bytes[at..at + 2].try_into().unwrap());
        // 16 bytes of header, 4 of the type's, an attribute of 4 + 6 + 2 bytes.
        assert_eq!((word(0), half(4), word(8)), (32, 16, 0));
        assert_eq!((half(20), half(22)), (10, 1));
        assert_eq!((word(32), half(36), word(40)), (20, 20, 1));
        assert_eq!(bytes.len(), 52);
        assert_eq!(Request::default().finish().0, []);
    }

    #[test]
    fn acknowledgements_are_found() {
        let message = |kind: u16, number: u32, code: i32| {
            let mut bytes = 36u32.to_ne_bytes().to_vec();
            bytes.extend(kind.to_ne_bytes());
            bytes.extend([0; 2]);
            bytes.extend(number.to_ne_bytes());
            bytes.extend([0; 4]);
            bytes.extend(code.to_ne_bytes());
            bytes.resize(36, 0);
            bytes
        };
        let error = libc::NLMSG_ERROR as u16;
        let all = [message(error, 0, 0), message(16, 1, 0), message(error, 2, -17)].concat();
        assert_eq!(acknowledgements(&all), [(0, 0), (2, -17)]);
        for length in 0..20 {
            assert_eq!(acknowledgements(&all[..length]), []);
        }
        assert_eq!(acknowledgements(&[0; 64]), []);
    }
}

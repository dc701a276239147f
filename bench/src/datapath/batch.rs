//! Many datagrams in one system call, so that what is measured is the path and not the sockets.

use std::io;
use std::os::fd::RawFd;
use std::ptr;

/// Datagrams of a batch.
const COUNT: usize = 32;

/// Buffers for a batch of datagrams of one length.
pub struct Batch {
    // `headers` points into the two others, which do not move when this value does.
    _payloads: Box<[u8]>,
    _parts: Box<[libc::iovec]>,
    headers: Box<[libc::mmsghdr]>,
}

impl Batch {
    pub fn new(length: usize) -> Self {
        let mut payloads = vec![0; length * COUNT].into_boxed_slice();
        let mut parts: Box<[libc::iovec]> = payloads
            .chunks_exact_mut(length)
            .map(|payload| libc::iovec { iov_base: payload.as_mut_ptr().cast(), iov_len: length })
            .collect();
        let header = |part: &mut libc::iovec| libc::mmsghdr {
            msg_hdr: libc::msghdr {
                msg_name: ptr::null_mut(),
                msg_namelen: 0,
                msg_iov: ptr::from_mut(part),
                msg_iovlen: 1,
                msg_control: ptr::null_mut(),
                msg_controllen: 0,
                msg_flags: 0,
            },
            msg_len: 0,
        };
        let headers = parts.iter_mut().map(header).collect();
        Self { _payloads: payloads, _parts: parts, headers }
    }

    /// Sends all on a connected socket, as far as it takes them: how many.
    pub fn send(&mut self, socket: RawFd) -> io::Result<usize> {
        // SAFETY: the headers and what they point to are this value's.
        count(unsafe { libc::sendmmsg(socket, self.headers.as_mut_ptr(), COUNT as u32, 0) })
    }

    /// Takes those that are there: how many; `WouldBlock` if there is none.
    pub fn receive(&mut self, socket: RawFd) -> io::Result<usize> {
        let (flags, timeout) = (libc::MSG_DONTWAIT, ptr::null_mut());
        // SAFETY: the headers and what they point to are this value's, and nobody reads them.
        count(unsafe {
            libc::recvmmsg(socket, self.headers.as_mut_ptr(), COUNT as u32, flags, timeout)
        })
    }
}

fn count(result: libc::c_int) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

// SAFETY: the pointers are to memory that the value owns and that no other thread has.
unsafe impl Send for Batch {}

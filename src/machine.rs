//! What is asked of the operating system: memory back to it, room for files, its own address.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsRawFd, BorrowedFd},
    path::Path,
};

use rustix::{
    fs::{Access, access},
    process::{Resource, Rlimit, getrlimit, getuid, setrlimit},
};

/// Open files beside the sockets of clients: the database, Redis, a margin.
const OTHER_FILES: u64 = 200;

/// How many files a server of so many sockets opens.
pub fn files_needed(sockets: usize) -> u64 {
    sockets as u64 + OTHER_FILES
}

/// Raises the limit of open files, which is 1,024 by default, as far as the system lets a process: each
/// connection is a file. Returns how many may be open; none: no limit.
pub fn raise_file_limit() -> Option<u64> {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    // Where this is refused, the old limit stays and is what the caller learns.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
    getrlimit(Resource::Nofile).current
}

/// The user of the operating system that this process is of: the name, or else the number.
pub(crate) fn user() -> String {
    user_named(getuid().as_raw())
}

/// The name of a user of the operating system, or else the number.
pub(crate) fn user_named(id: u32) -> String {
    let id = id.to_string();
    let users = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let of_id = |line: &str| {
        let mut fields = line.split(':');
        let (name, number) = (fields.next()?, fields.nth(1)?);
        (number == id).then(|| name.to_owned())
    };
    users.lines().find_map(of_id).unwrap_or(id)
}

/// The name of this machine.
pub(crate) fn host() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = name.trim();
    if name.is_empty() { "unknown host".to_owned() } else { name.to_owned() }
}

/// How this machine reaches what listens on an address, which may stand for all that it has.
pub(crate) fn local(mut address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        address.set_ip(match address.ip() {
            IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        });
    }
    address
}

/// Whether a file could be made in its folder, and the folder where there is none. Makes neither.
pub(crate) fn can_make(file: &Path) -> io::Result<()> {
    let there = |folder: &&Path| folder.symlink_metadata().is_ok();
    let folder = file.ancestors().skip(1).find(there).unwrap_or(Path::new("."));
    let allowed = match folder.is_dir() {
        true => access(folder, Access::WRITE_OK | Access::EXEC_OK).map_err(io::Error::from),
        false => Err(io::ErrorKind::NotADirectory.into()),
    };
    let name = folder.display();
    allowed.map_err(|error| io::Error::new(error.kind(), format!("{name} cannot be used: {error}")))
}

/// Has the kernel take so many bytes of a socket at most before it sends them; of a listener, for all of its
/// sockets.
#[cfg(target_os = "linux")]
#[expect(unsafe_code, reason = "rustix does not offer this option")]
pub(crate) fn bound_unsent(socket: BorrowedFd<'_>, bytes: i32) -> io::Result<()> {
    let (socket, size) = (socket.as_raw_fd(), size_of_val(&bytes) as libc::socklen_t);
    let (level, option) = (libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT);
    // SAFETY: the descriptor is open while it is borrowed, and the pointer is to an integer of that size.
    let set = unsafe { libc::setsockopt(socket, level, option, (&raw const bytes).cast(), size) };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Memory on its way back.
pub(crate) type Cached = Vec<Vec<u8>>;

/// Takes what glibc keeps at hand for the calling thread: seven freed pieces of each size up to 1,032
/// bytes. They count as used, and those of a crowd lie apart: each would hold a page.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub(crate) fn cached_memory() -> Cached {
    (24..=1032).step_by(16).flat_map(|size| (0..7).map(move |_| Vec::with_capacity(size))).collect()
}

/// Returns every free page of the heap to the system. glibc alone returns what lies at the top of its
/// heap; connections leave their memory between what lives on, and a node that served 10,000 would stay
/// at that size. Takes milliseconds for each 100 MiB and holds up allocations meanwhile: to be called
/// when many things have ended, on a thread that may wait.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[expect(unsafe_code, reason = "no library offers this call of the C library as a safe function")]
pub(crate) fn give_memory_back(cached: Vec<Cached>) {
    // What a thread keeps at hand is given up when it ends.
    drop(std::thread::spawn(|| drop(cached)).join());
    // SAFETY: it has no preconditions, takes no pointer and changes nothing that is in use.
    unsafe { libc::malloc_trim(0) };
    tracing::debug!("free memory was given back to the system");
}

/// Other C libraries give back by themselves, or have no call for it.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub(crate) fn cached_memory() -> Cached {
    Cached::new()
}

/// See above.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub(crate) fn give_memory_back(_: Vec<Cached>) {}

//! Where the ranks of a run meet, and which of them this is.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, ToSocketAddrs};
use std::str::FromStr;
use std::time::Duration;

use sha2::{Digest, Sha256};

use crate::{Error, Result};

/// Which rank this process is, and where rank 0 is found.
#[derive(Clone, Debug, PartialEq)]
pub struct Place {
    /// This process among all, from 0.
    pub rank: usize,
    /// How many there are.
    pub world: usize,
    /// This process among those of its machine, from 0: the GPU that is its own.
    pub local_rank: usize,
    /// The machine of rank 0: a name or an address.
    pub address: String,
    /// The port that rank 0 listens at.
    pub port: u16,
    /// What only ranks of this run know; may be empty.
    pub token: String,
    /// A rank that says nothing for so long is lost. Each gives a sign of life every eighth of it.
    pub patience: Duration,
}

impl Place {
    /// The variable with [`Place::token`].
    pub const TOKEN: &'static str = "SPINQUANT_RANKS_TOKEN";
    /// The variable with a port in place of `MASTER_PORT`.
    pub const PORT: &'static str = "SPINQUANT_MASTER_PORT";

    /// The variable with [`Place::patience`], in seconds.
    pub const PATIENCE: &'static str = "SPINQUANT_RANKS_PATIENCE";

    /// A rank among others of this machine that meet at a port.
    pub fn local(rank: usize, world: usize, port: u16) -> Self {
        let address = Ipv4Addr::LOCALHOST.to_string();
        Self { rank, world, local_rank: rank, address, port, token: String::new(), patience: Duration::from_secs(15) }
    }

    /// What `torchrun`, or another launcher, has set: `RANK`, `WORLD_SIZE`, `LOCAL_RANK` (where it is missing: `RANK`), `MASTER_ADDR` and
    /// `MASTER_PORT`; nothing where `RANK` and `WORLD_SIZE` are not set, or there is one rank alone. Where the launcher itself listens at
    /// `MASTER_PORT` (`TORCHELASTIC_USE_AGENT_STORE`), the ranks meet at the port after it.
    ///
    /// # Errors
    /// Variables that are missing or are no such numbers, by name.
    pub fn from_env(get: impl Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        let (Some(rank), Some(world)) = (number::<usize>(&get, "RANK")?, number::<usize>(&get, "WORLD_SIZE")?) else {
            return Ok(None);
        };
        if rank >= world {
            return Err(Error::argument("RANK", format!("expected less than WORLD_SIZE, which is {world}, got {rank}")));
        }
        if world == 1 {
            return Ok(None);
        }
        let missing =
            |name: &str| Error::argument(name, format!("expected it beside RANK={rank} and WORLD_SIZE={world}, got nothing"));
        let address = get("MASTER_ADDR").ok_or_else(|| missing("MASTER_ADDR"))?;
        let port = match Self::port_of(&get)? {
            Some(port) => port,
            None => {
                let port = number::<u16>(&get, "MASTER_PORT")?.ok_or_else(|| missing("MASTER_PORT"))?;
                let taken = get("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|v| v.eq_ignore_ascii_case("true"));
                if taken { port.checked_add(1).unwrap_or(port - 1) } else { port }
            }
        };
        let local_rank = number(&get, "LOCAL_RANK")?.unwrap_or(rank);
        let patience = match number::<u32>(&get, Self::PATIENCE)? {
            Some(0) => return Err(Error::argument(Self::PATIENCE, "expected at least a second, got 0")),
            Some(seconds) => Duration::from_secs(seconds.into()),
            None => Self::local(rank, world, port).patience,
        };
        let token = get(Self::TOKEN).or_else(|| get("TORCHELASTIC_RUN_ID")).unwrap_or_default();
        Ok(Some(Self { rank, world, local_rank, address, port, token, patience }))
    }

    /// The port that [`Place::PORT`] names; nothing where it is not set.
    ///
    /// # Errors
    /// A value that is no port.
    pub fn port_of(get: impl Fn(&str) -> Option<String>) -> Result<Option<u16>> {
        number(get, Self::PORT)
    }

    /// Listens for the other ranks: at this machine alone where the address is its own name for itself, else at all its addresses.
    ///
    /// # Errors
    /// A port that is taken.
    pub fn listen(&self) -> Result<TcpListener> {
        let own = self.address == "localhost" || self.address.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
        let (v4, v6) =
            (SocketAddr::from((Ipv4Addr::UNSPECIFIED, self.port)), SocketAddr::from((Ipv6Addr::UNSPECIFIED, self.port)));
        let bound = match own {
            true => TcpListener::bind((self.address.as_str(), self.port)),
            false => TcpListener::bind(v6).or_else(|_| TcpListener::bind(v4)),
        };
        bound.map_err(|e| {
            let message =
                format!("rank 0 cannot listen at {}:{}: {e} ({} sets another port)", self.address, self.port, Self::PORT);
            Error::argument("ranks", message)
        })
    }

    /// Where rank 0 may be found.
    pub(super) fn addresses(&self) -> std::io::Result<Vec<SocketAddr>> {
        Ok((self.address.as_str(), self.port).to_socket_addrs()?.collect())
    }

    /// What the ranks of this run greet one another with: equal for all that belong together.
    pub(super) fn greeting(&self) -> [u8; 32] {
        let all = format!("spinquant {} ranks {} {}", env!("CARGO_PKG_VERSION"), self.world, self.token);
        Sha256::digest(all.as_bytes()).into()
    }
}

/// A variable as a number; nothing where it is not set.
fn number<T: FromStr>(get: impl Fn(&str) -> Option<String>, name: &str) -> Result<Option<T>> {
    let Some(text) = get(name) else { return Ok(None) };
    let bad = |_| Error::argument(name, format!("expected a number from 0 on, got {text:?}"));
    text.trim().parse().map(Some).map_err(bad)
}

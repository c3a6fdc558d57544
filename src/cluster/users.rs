//! Which user an administrator means. Users are known by `sub`; names are for people, and some providers
//! let users choose them, also one that is another user's name or `sub`.

use std::{collections::BTreeSet, sync::Arc};

use serde::Deserialize;

use super::Cluster;
use crate::auth::MAX_NAME;

/// Users that are looked for: an answer that names more of them helps nobody.
const MOST: usize = 10;

/// What a text names a user by.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum NamedBy {
    /// The `sub`, or the name that a connection was opened by.
    #[default]
    SubOrName,
    /// The `sub` alone, which also users have who are not connected.
    Sub,
}

/// A user, as nodes tell each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct User {
    /// None: no user of this `sub` or name is known here. Nodes that drain have connections that Redis
    /// does not know any more: each decides by its own.
    pub(crate) subject: Option<Arc<str>>,
    /// With a `subject`: what older nodes go by, who know users by name alone. Empty where it is not this
    /// user's alone, so that they pass it over. Without: the text itself.
    pub(super) name: Arc<str>,
}

impl Cluster {
    /// The user whom a text names, as far as the connections of all nodes tell, or without Redis those of
    /// this node. The error has the `sub` of each user whom it may mean.
    pub(crate) async fn user(&self, text: &str, by: NamedBy) -> Result<User, BTreeSet<Arc<str>>> {
        let subject = match by {
            NamedBy::Sub => Some(text.into()),
            NamedBy::SubOrName => {
                let mut users = self.users(text).await;
                if users.len() > 1 {
                    return Err(users);
                }
                users.pop_first()
            }
        };
        let Some(subject) = subject else { return Ok(User { subject: None, name: text.into() }) };
        let name = self.name_for_older_nodes(text, &subject).await;
        Ok(User { subject: Some(subject), name })
    }

    /// The one user here whose `sub` or name this is. None: there are several, or there is none.
    pub(super) fn only_user_here(&self, text: &str) -> Option<Arc<str>> {
        let mut users = self.hub.users(text);
        if users.len() > 1 {
            self.broadcast_errors.inc();
            tracing::warn!(
                users = users.len(),
                "an event names several users: it is for none of them"
            );
            return None;
        }
        users.pop()
    }

    async fn users(&self, text: &str) -> BTreeSet<Arc<str>> {
        let mut users = BTreeSet::from_iter(self.hub.users(text));
        if let Some(others) = &self.others {
            match others.leases.ledger.has_user(text).await {
                Ok(true) => drop(users.insert(text.into())),
                Ok(false) => {}
                Err(error) => tracing::debug!(%error, "redis does not tell of a user"),
            }
        }
        self.add_named(text, &mut users).await;
        users
    }

    /// Adds the users whose name this is.
    async fn add_named(&self, name: &str, users: &mut BTreeSet<Arc<str>>) {
        users.extend(self.hub.named(name));
        if let Some(others) = &self.others
            && let Err(error) = others.leases.ledger.add_named(name, users, MOST).await
        {
            tracing::debug!(%error, "redis does not tell of a name");
        }
    }

    async fn name_for_older_nodes(&self, text: &str, subject: &Arc<str>) -> Arc<str> {
        let Some(others) = &self.others else { return Arc::default() };
        if *text != **subject {
            return text.into();
        }
        let name = match self.hub.name_of(subject) {
            Some(name) => Some(name),
            None => others.leases.ledger.name_of(subject).await.ok().flatten(),
        };
        let Some(name) = name.filter(|name| name.len() <= MAX_NAME) else { return Arc::default() };
        let mut users = BTreeSet::from([Arc::clone(subject)]);
        self.add_named(&name, &mut users).await;
        if users.len() == 1 { name } else { Arc::default() }
    }
}

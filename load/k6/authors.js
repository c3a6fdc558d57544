// Authors over WebSocket: nine pages are read for each one that is made.
//
//   k6 run -e URL=http://127.0.0.1:8000 -e TOKENS=$PWD/tokens.txt load/k6/authors.js

import { check } from "k6";
import { Connection, uuid } from "./switchboard.js";

export { options } from "./switchboard.js";

export default () =>
  Connection.run(async (connection) => {
    const name = `k6 ${uuid()}`;
    const { data } = await connection.request(3, { name });
    check(data, { "an author is made": (data) => data.name === name });
    for (let page = 1; page < 10; page++) {
      const { data } = await connection.request(2, { page, per_page: 20 });
      check(data, { "a page has at most 20": (data) => data.length <= 20 });
    }
  });

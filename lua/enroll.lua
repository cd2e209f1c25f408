-- Opens a session of a subject, or gives a subject one that is open, under a new id. Never touches a
-- session that is there already under that id.
--   KEYS[1]     the new session's hash
--   KEYS[2]     the subject's index
--   KEYS[3]     there if nobody may be given that id any more; kept for an hour
--   KEYS[4]     the hash of the session that is open, if ARGV[8] is given
--   KEYS[4..]   or KEYS[5..]: the sessions' hashes, as this script listed them
--   ARGV[1]     fingerprint of the new token, 16 bytes
--   ARGV[2]     ttl: seconds from now; 0 stores nothing. '' with ARGV[8]
--   ARGV[3]     '1' if this same call was sent before and may have run, else '0'
--   ARGV[4]     idle timeout: whole seconds, or '' for none. '' with ARGV[8]
--   ARGV[5]     the new session's id
--   ARGV[6]     when it was started: 16 digits of microseconds since 1970, or '' for now
--   ARGV[7]     generation of the new token
--   ARGV[8]     fingerprint of the token of the session that is open, or ''
--   ARGV[9]     the id of that one, or ''
--   ARGV[10]    how many live sessions the subject may have, this one included; 0 for any number
--   ARGV[11]    '1' if the oldest have to go for it, '0' if it is to be refused
--   ARGV[12]    how many realms there are
--   ARGV[13]    how many sessions were listed
--   ARGV[14]    how many payloads there are
--   ARGV[15]    how many payloads the session that is open has, if they are to be replaced, or ''
--   ARGV[16..]  each realm .. the subject, the new session's first; then the index entry of each
--               session that was listed; then payload field, its data, and so on; then of each payload
--               that is to be replaced its field, what stands there and what is to stand there
--   ARGV[last]  echo, behind every reply
-- Returns echo; or, if it has to know which sessions of the index are live, the index entry of each, 32
-- bytes, .. echo, and nothing was done. Errors: IDTAKEN, NOSESSION, TOOMANY, CHANGED (the session has
-- other payloads than those to be replaced), INCOMPLETE.
local echo, successor, ttl, idle = ARGV[#ARGV], ARGV[1], tonumber(ARGV[2]), ARGV[4]
local tries, again = KEYS[3], ARGV[3]
local new, index, id, started, generation = KEYS[1], KEYS[2], ARGV[5], ARGV[6], ARGV[7]
local session, fingerprint, session_id = nil, ARGV[8], ARGV[9]
local limit, evicts = tonumber(ARGV[10]), ARGV[11]
local realms, listed, payloads = tonumber(ARGV[12]), tonumber(ARGV[13]), tonumber(ARGV[14])
local replaced = tonumber(ARGV[15])
local fields = 16 + realms + listed
local replacements = fields + 2 * payloads
local grows = true -- whether it may take memory

-- If the network lost a digit of how many words there are, the last ones are missing.
if #ARGV ~= replacements + 3 * (replaced or 0) then
  return redis.error_reply('INCOMPLETE ' .. echo)
end

-- Redis before 5 replicates the script itself unless told to replicate what it wrote, and refuses
-- writes after TIME if it does.
if redis.replicate_commands then redis.replicate_commands() end

-- Only the first try opens a session. If there is none, that one never came, is still on its way, or
-- what it opened has ended: it must open nothing any more, and the caller goes on with another id.
if again == '1' then
  local there = redis.call('HGET', new, 'fp')
  if there and string.sub(there, 1, 16) == successor then return echo end
  local noted = redis.pcall('SET', tries, '', 'PX', 3600000)
  if noted.err then return redis.error_reply(noted.err .. ' ' .. echo) end
end
if again == '1' or redis.call('EXISTS', new, tries) > 0 then
  return redis.error_reply('IDTAKEN ' .. echo)
end
if ttl and ttl <= 0 then return echo end

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local ends, own
if fingerprint ~= '' then
  session = KEYS[4]
  own = redis.call('HGET', session, 'fp')
  -- (alike in every script) Is this the session's token? And if it has an idle timeout, it begins anew.
  if not own or #own > 32 or #fingerprint ~= 16 or string.find(own, fingerprint, 1, true) ~= 1 then
    if redis.replicate_commands then redis.replicate_commands() end
    local time = redis.call('TIME')
    local now = time[1] * 1000 + math.floor(time[2] / 1000)
    local opens = own and string.sub(own, 1, 16) == fingerprint
    local old = own and not opens and redis.call('HGET', session, 'old') or ''
    for at = 1, #old, 29 do
      local grace_ends = tonumber(string.sub(old, at + 16, at + 28))
      opens = opens or string.sub(old, at, at + 15) == fingerprint and now < grace_ends
    end
    if not opens then return redis.error_reply('NOSESSION ' .. echo) end
    local idle, left = tonumber(string.sub(own, 46)), redis.call('PTTL', session)
    if idle and left <= idle * 900 then
      local ends = math.min(tonumber(string.sub(own, 33, 45)), now + idle * 1000)
      if ends > now + left + 10 then
        -- A full server refuses no write but a script's first: let that be one that it would refuse.
        local kept = grows and redis.pcall('HSET', session, 'fp', own) or 0
        if kept == 1 then redis.call('UNLINK', session) end -- it had just evicted the session
        local used = kept
        if kept == 0 then used = redis.pcall('PEXPIREAT', session, string.format('%.0f', ends)) end
        if used == 0 or kept == 1 then return redis.error_reply('NOSESSION ' .. echo) end
        if used ~= 1 then return redis.error_reply(used.err .. ' ' .. echo) end
      end
    end
  end
  started = string.sub(own, 17, 32)
  ends = tonumber(string.sub(own, 33, 45)) or now + redis.call('PTTL', session)
  own = successor .. string.sub(own, 17)
  if replaced then
    local expected, same, held = {}, 0, redis.call('HGETALL', session)
    for i = replacements, #ARGV - 1, 3 do expected[ARGV[i]] = ARGV[i + 1] end
    for i = 1, #held, 2 do
      local kind, data = string.sub(held[i], 1, 1), held[i + 1]
      if kind == ':' or kind == ';' and now < (tonumber(string.sub(data, 1, 13)) or 0) then
        if expected[held[i]] ~= data then return redis.error_reply('CHANGED ' .. echo) end
        same = same + 1
      end
    end
    if same ~= replaced then return redis.error_reply('CHANGED ' .. echo) end
  end
else
  if started == '' then started = string.format('%010.0f%06.0f', time[1], time[2]) end
  ends = now + ttl * 1000
  own = successor .. started
  if idle ~= '' then own = own .. string.format('%013.0f', ends) .. idle end
end

-- Is there room? What is not among KEYS may be dead or alive; to look, it has to be.
local since = string.format('%.0f', now)
local count = redis.call('ZCARD', index)
if count >= 15 or limit > 0 and count >= limit then
  count = redis.call('ZCOUNT', index, since, '+inf') -- less what is over
end
local live, dead, excess = {}, {}, 0
local full = limit > 0 and count >= limit
-- Without a limit too the index must not fill with sessions that ended: at 16 entries, 32, 64 ... (No
-- further than a call can name them: before Redis 7 it has room for a million words.)
local due = 16
while due <= count do due = due * 2 end
due = listed == 0 and due == count + 1 and due <= 131072
if full or due or listed > 0 then
  local keys, first = {}, #KEYS - listed
  for i = 1, listed do keys[ARGV[15 + realms + i]] = KEYS[first + i] end
  local ours, entries, unknown = {}, redis.call('ZRANGEBYSCORE', index, since, '+inf'), 0
  for i = 16, 15 + realms do ours[ARGV[i]] = true end
  for _, entry in ipairs(entries) do
    if string.sub(entry, 17) ~= session_id then
      local held = keys[entry] and redis.call('HMGET', keys[entry], 'sub', 'pending')
      if not held then
        unknown = unknown + 1
      elseif not held[1] then
        dead[#dead + 1] = entry
      elseif ours[held[1]] and not held[2] then
        live[#live + 1] = entry
      end
    end
  end
  if unknown > 0 and (due or full and #live + unknown >= limit) then
    return table.concat(entries) .. echo
  end
  if full and #live >= limit then
    if evicts == '0' then
      return redis.error_reply('TOOMANY ' .. echo)
    end
    excess = #live - limit + 1
    table.sort(live)
    for i = 1, excess do live[i] = {live[i], keys[live[i]]} end
  end
end

-- All that can fail comes first, or is undone.
local entry = started .. id
local written = redis.pcall('ZADD', index, string.format('%.0f', ends), entry)
if type(written) == 'table' then return redis.error_reply(written.err .. ' ' .. echo) end
if session then
  -- Redis before 6 evicts inside a script, before its first write: that very session perhaps.
  written = redis.call('EXISTS', session) == 1 and redis.pcall('RENAME', session, new)
  if not written or written.err then
    redis.call('ZREM', index, entry)
    return redis.error_reply((written and written.err or 'NOSESSION') .. ' ' .. echo)
  end
  redis.call('HSET', new, 'fp', own, 'sub', ARGV[16])
  redis.call('HDEL', new, 'old', 'pending')
  redis.call('ZREM', index, started .. session_id)
else
  written = redis.pcall('HSET', new, 'fp', own, 'sub', ARGV[16])
  if written ~= 2 then
    redis.call('ZREM', index, entry)
    return redis.error_reply(written.err .. ' ' .. echo)
  end
end
if generation ~= '0' then redis.call('HSET', new, 'gen', generation) end
for i = fields, replacements - 1, 2 do redis.call('HSET', new, ARGV[i], ARGV[i + 1]) end
for i = replacements, #ARGV - 1, 3 do redis.call('HSET', new, ARGV[i], ARGV[i + 2]) end
if not session then
  -- Last: if this end has come by now, nothing may be written after it.
  local first = ends
  if idle ~= '' then first = math.min(ends, now + tonumber(idle) * 1000) end
  local expires = redis.pcall('PEXPIREAT', new, string.format('%.0f', first))
  if expires ~= 1 then
    redis.call('ZREM', index, entry)
    if redis.pcall('UNLINK', new) ~= 1 then
      redis.pcall('HDEL', new, 'fp', 'sub', 'gen')
      for i = fields, replacements - 1, 2 do redis.pcall('HDEL', new, ARGV[i]) end
    end
    return redis.error_reply(expires.err .. ' ' .. echo)
  end
end
redis.call('ZREMRANGEBYSCORE', index, '-inf', '(' .. since)
for i = 1, #dead, 1000 do redis.call('ZREM', index, unpack(dead, i, math.min(i + 999, #dead))) end
for i = 1, excess do
  redis.call('UNLINK', live[i][2])
  redis.call('ZREM', index, live[i][1])
end
if listed == 0 and not session and now + redis.call('PTTL', index) <= ends then
  -- By far the most frequent: nothing went, and the new session ends last.
  redis.call('PEXPIREAT', index, string.format('%.0f', ends))
  return echo
end
local left = 1 -- at least, the new one
-- (alike in every script) The index ends with the last of its sessions. If there is none left, it is
-- gone, and in a slot that moves what is gone cannot be asked again.
local last = left > 0 and redis.call('ZREVRANGE', index, 0, 0, 'WITHSCORES')[2]
if last then redis.call('PEXPIREAT', index, last) end
return echo
